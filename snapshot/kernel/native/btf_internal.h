/* Where members of the kernel's own structs are: its BTF (Documentation/bpf/btf.rst). */
#ifndef SNAP_BTF_INTERNAL_H
#define SNAP_BTF_INTERNAL_H
#include <stddef.h>
#include <stdint.h>

typedef struct {
    unsigned char *bytes;
    const char *strings;
    const unsigned char **types; /* by id; [0] is void */
    uint32_t count;
} snap_btf;

/* `path`: /sys/kernel/btf/vmlinux. 0 or -errno, then `made` is empty (-ENOENT: a kernel without). */
int snap_btf_load(const char *path, snap_btf *made);
void snap_btf_free(snap_btf *btf);
/* The id of a function; 0: there is none. */
uint32_t snap_btf_function(const snap_btf *btf, const char *name);
/* Bytes from the begin of a struct to its member, also of one inside an anonymous struct or union; of
   a bit field: to the 4 aligned bytes that it is in. -1: there is none. */
int64_t snap_btf_offset(const snap_btf *btf, const char *structure, const char *member);

#endif
