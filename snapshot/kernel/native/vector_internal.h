/* Growing arrays. */
#pragma once
#include <stddef.h>

#define VECTOR(type) \
    struct {         \
        type *at;    \
        size_t count, capacity; \
    }

/* The address of one more element, or NULL when there is no memory. */
#define VECTOR_PUSH(v) \
    (snap_grow((void **)&(v)->at, &(v)->capacity, (v)->count, sizeof *(v)->at) ? NULL : &(v)->at[(v)->count++])
int snap_grow(void **at, size_t *capacity, size_t count, size_t size);
