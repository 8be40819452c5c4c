/* Memory, ours or another's, that will be needed while somebody waits. */
#pragma once
#include <stdint.h>

/* Reads a byte of each page that is there of ranges[2 * i] up to ranges[2 * i + 1], page aligned addresses in
 * process `pid`, whose /proc/PID/pagemap is `pagemap`; anonymous: but those of files. What is unmapped meanwhile
 * is passed over, and who wants this processor comes first, for 10 ms in all. -> how many pages, -ENOTTY: a kernel
 * before 6.7. */
int64_t snap_warm(int pid, int pagemap, int anonymous, const uint64_t *ranges, uint64_t count);
