/* The B-trees of an LMDB data file, checked before LMDB walks them.
 *
 * LMDB trusts its own pages: an offset that leads out of a page, or a page number beyond the file,
 * ends the process in SIGSEGV, SIGBUS or an assertion. Here every page of every tree of one
 * transaction is read with pread(2), so nothing that it says can lead anywhere.
 *
 * Format: data version 1 of LMDB 0.9 on 64-bit little endian (mdb.c: MDB_page, MDB_node, MDB_db,
 * MDB_meta).
 */
#ifndef SNAP_BTREE_H
#define SNAP_BTREE_H

#include <stdint.h>

#define BTREE_DEEP 1 /* the first page of every long value too: one read for each of them */

typedef struct btree_report {
    uint64_t page;     /* the damaged page */
    uint64_t pages;    /* tree pages that were read */
    char reason[96];   /* "" when all is sound */
} btree_report;

/* Checks the trees of transaction `txnid` in the file `fd` with pages of `page_size` bytes. The caller
 * holds a read transaction of that number, or is alone: the pages must not change meanwhile.
 * 0: `report` says whether all is sound; -EAGAIN: the meta page is that of another transaction (a
 * writer may have been faster); another -errno: it could not be found out. */
int btree_check(int fd, uint32_t page_size, uint64_t txnid, int flags, btree_report *report);

#endif
