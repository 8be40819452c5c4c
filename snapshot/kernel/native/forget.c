#include "forget.h"

#include <errno.h>
#include <sys/mman.h>

int snap_forget(uint64_t start, uint64_t end)
{
    return madvise((void *)start, end - start, MADV_DONTNEED) ? -errno : 0;
}
