/* The system's libzstd, by its functions that work without buffers of their own: one call is one
 * block of a frame, which Python's zstandard has no way to ask for. Loaded and not linked: with no such
 * library there are no blocks (blocks.h), and nothing else is missing. */
#pragma once
#include <stddef.h>

/* ZSTD_parameters, only handed from one function to another */
typedef struct {
    struct { unsigned window, chain, hash, search, least, target; int strategy; } compression;
    struct { int content_size, checksum, no_dictionary; } frame;
} zstd_parameters;

typedef struct {
    void *(*compressor)(void);
    size_t (*free_compressor)(void *);
    zstd_parameters (*parameters)(int level, unsigned long long bytes, size_t dictionary);
    size_t (*begin)(void *, const void *dictionary, size_t, zstd_parameters, unsigned long long bytes);
    size_t (*block)(void *, void *to, size_t room, const void *from, size_t bytes);
    size_t (*last)(void *, void *to, size_t room, const void *from, size_t bytes);
    void *(*decompressor)(void);
    size_t (*free_decompressor)(void *);
    size_t (*begin_reading)(void *);
    size_t (*wanted)(void *);
    size_t (*read)(void *, void *to, size_t room, const void *from, size_t bytes);
    unsigned (*failed)(size_t);
} zstd_functions;

/* NULL: there is none that has them all. */
const zstd_functions *snap_zstd(void);
