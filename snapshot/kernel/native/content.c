/* What a chunk holds, found out before anything is spent on it. */
#include "content.h"

#include <stdbool.h>
#include <string.h>

#include "chunk_internal.h"

enum { SAMPLE = 512 };

static bool is_zero(const char *page)
{
    uint64_t first;
    memcpy(&first, page, sizeof first);
    return first == 0 && memcmp(page, page + sizeof first, PAGE - sizeof first) == 0;
}

/* With n sampled bytes that are all equally likely the squares of how often each comes add up to
 * n + n * n / 256; text and numbers have several times that. */
static bool is_noise(const char *data, uint32_t pages)
{
    uint32_t times[256] = {0}, squares = 0;
    uint32_t each = SAMPLE / (uint32_t)__builtin_popcount(pages), n = 0;
    for (uint32_t page = 0; page < PAGES; page++) {
        if (!(pages >> page & 1))
            continue;
        /* Not at the same place of each: structures repeat with the page. */
        const unsigned char *at = (const unsigned char *)data + page * PAGE + page * (PAGE - SAMPLE) / PAGES;
        for (uint32_t i = 0; i < each; i++)
            times[at[i]]++;
        n += each;
    }
    for (int value = 0; value < 256; value++)
        squares += times[value] * times[value];
    return squares < n + n * n / 256 * 5 / 4;
}

uint32_t snap_content(const char *data, uint32_t present)
{
    uint32_t filled = 0;
    for (uint32_t page = 0; page < PAGES; page++)
        if (present >> page & 1 && !is_zero(data + page * PAGE))
            filled |= 1u << page;
    return filled && is_noise(data, filled) ? filled | SNAP_NOISE : filled;
}

uint32_t snap_differing(const char *a, const char *b)
{
    uint32_t differ = 0;
    for (uint32_t page = 0; page < PAGES; page++)
        if (memcmp(a + page * PAGE, b + page * PAGE, PAGE))
            differ |= 1u << page;
    return differ;
}
