#include "vector_internal.h"

#include <errno.h>
#include <stdlib.h>

int snap_grow(void **at, size_t *capacity, size_t count, size_t size)
{
    if (count < *capacity)
        return 0;
    size_t wider = *capacity ? *capacity * 2 : 64;
    void *moved = realloc(*at, wider * size);
    if (!moved)
        return -ENOMEM;
    *at = moved;
    *capacity = wider;
    return 0;
}
