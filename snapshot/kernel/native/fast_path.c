#define _GNU_SOURCE
#include "fast_path.h"

#include <errno.h>
#include <poll.h>
#include <stdbool.h>
#include <stdlib.h>
#include <unistd.h>

enum { PAGE = 4096, PAGES = 16, CHUNK = PAGE * PAGES, ALL = 0xffff, MOST_OTHERS = 256 };
#define PLACED(pages) ((uint32_t)(pages) << 16) /* in `wanted`: they have come from there, and are no longer */

struct snap_fast_path {
    snap_stored *stored;
    int uffd;
    uint32_t *wanted; /* of each chunk: bitmap of the pages that are to come from there */
    /* What was decoded with the last page, for when nobody waits. */
    struct { uint32_t chunk, pages, present; } rest;
    struct pollfd waits[1 + MOST_OTHERS]; /* the userfaultfd first */
    uint32_t others;
    char pages[CHUNK];
};

snap_fast_path *snap_fast_path_new(snap_stored *stored, int uffd)
{
    snap_fast_path *fast = calloc(1, sizeof *fast);
    if (!fast)
        return NULL;
    fast->wanted = calloc(snap_stored_count(stored) + 1, sizeof *fast->wanted);
    if (!fast->wanted) {
        free(fast);
        return NULL;
    }
    fast->stored = stored, fast->uffd = uffd;
    fast->waits[0] = (struct pollfd){.fd = uffd, .events = POLLIN};
    return fast;
}

void snap_fast_path_free(snap_fast_path *fast)
{
    if (fast)
        free(fast->wanted);
    free(fast);
}

static void set(snap_fast_path *fast, uint64_t start, uint64_t end, bool wanted)
{
    uint32_t count = snap_stored_count(fast->stored);
    for (uint32_t i = snap_stored_from(fast->stored, start & ~(uint64_t)(CHUNK - 1)); i < count; i++) {
        uint64_t base = snap_stored_address(fast->stored, i);
        if (base >= end)
            return;
        uint32_t first = start > base ? (uint32_t)((start - base) / PAGE) : 0;
        uint32_t last = end - base < CHUNK ? (uint32_t)((end - base) / PAGE) : PAGES;
        uint32_t pages = (1u << last) - (1u << first);
        if (wanted)
            fast->wanted[i] |= pages;
        else
            fast->wanted[i] &= ~(pages | PLACED(pages));
    }
}

void snap_fast_path_allow(snap_fast_path *fast, uint64_t start, uint64_t end)
{
    set(fast, start, end, true);
}

void snap_fast_path_forbid(snap_fast_path *fast, uint64_t start, uint64_t end)
{
    set(fast, start, end, false);
}

/* -> 0: the pages are dealt with, and on record; or -errno. */
static int place(snap_fast_path *fast, uint32_t chunk, uint32_t pages, uint32_t present, snap_fast_turn *turn)
{
    uffd_filled filled;
    uint64_t base = snap_stored_address(fast->stored, chunk);
    int error = uffd_fill(fast->uffd, base, fast->pages, pages, present, &filled);
    turn->filled += filled.copied + filled.zeroed;
    if (error)
        return error;
    fast->wanted[chunk] = (fast->wanted[chunk] & ~pages) | PLACED(pages);
    turn->chunks[turn->count++] = (snap_fast_chunk){base, pages};
    return 0;
}

/* Only while no event has been read since: which pages are wanted at all may be another thing after it. */
static void place_rest(snap_fast_path *fast, snap_fast_turn *turn)
{
    if (fast->rest.pages)
        place(fast, fast->rest.chunk, fast->rest.pages, fast->rest.present, turn);
    fast->rest.pages = 0;
}

/* -> whether nobody waits for the page any more. */
static bool serve(snap_fast_path *fast, uint64_t address, snap_fast_turn *turn)
{
    uint64_t base = address & ~(uint64_t)(CHUNK - 1);
    uint32_t page = (uint32_t)((address - base) / PAGE), i = snap_stored_from(fast->stored, base), present;
    if (i == snap_stored_count(fast->stored) || snap_stored_address(fast->stored, i) != base)
        return false;
    if (fast->wanted[i] & PLACED(1u << page)) /* it came between the fault and this */
        return uffd_wake(fast->uffd, base + page * PAGE, PAGE) == 0;
    if (!(fast->wanted[i] >> page & 1))
        return false;
    uint32_t known = snap_stored_decode(fast->stored, i, page, fast->pages, &present);
    if (!(known >> page & 1) || place(fast, i, 1u << page, present, turn))
        return false;
    fast->rest.chunk = i, fast->rest.present = present;
    fast->rest.pages = known & fast->wanted[i] & ALL;
    return true;
}

/* -> how many of `count` messages are left. */
static uint32_t serve_all(snap_fast_path *fast, uffd_message *messages, uint32_t count, snap_fast_turn *turn)
{
    uint32_t left = 0;
    for (uint32_t i = 0; i < count; i++)
        if (messages[i].event != UFFD_EVENT_PAGEFAULT) {
            fast->rest.pages = 0;
            return count;
        }
    for (uint32_t i = 0; i < count; i++) {
        place_rest(fast, turn);
        if (serve(fast, messages[i].arg[1], turn))
            turn->faults++;
        else
            messages[left++] = messages[i];
    }
    return left;
}

int snap_fast_path_watch(snap_fast_path *fast, const int *descriptors, uint32_t count)
{
    if (count > MOST_OTHERS)
        return -EINVAL;
    for (uint32_t i = 0; i < count; i++)
        fast->waits[1 + i] = (struct pollfd){.fd = descriptors[i], .events = POLLIN};
    fast->others = count;
    return 0;
}

int snap_fast_path_pending(const snap_fast_path *fast)
{
    return uffd_poll(fast->uffd, 0) != 0;
}

/* -> whether the userfaultfd has a message, or an error. */
static bool wait_for_any(snap_fast_path *fast, int timeout_ms, snap_fast_turn *turn)
{
    int ready = poll(fast->waits, 1 + fast->others, timeout_ms);
    if (ready <= 0)
        return false;
    bool ours = fast->waits[0].revents;
    turn->others = (uint32_t)ready - ours;
    return ours;
}

uint32_t snap_fast_path_turn(snap_fast_path *fast, int timeout_ms, uffd_message *messages, uint32_t most,
                             uint32_t row, uint32_t grace_us, snap_fast_turn *turn)
{
    turn->faults = turn->filled = turn->in_a_row = turn->others = turn->count = 0;
    turn->error = 0;
    if (!wait_for_any(fast, timeout_ms, turn))
        return 0;
    uint32_t left = 0;
    while (!left && turn->in_a_row < row && turn->faults < SNAP_FAST_MOST) {
        uint32_t room = SNAP_FAST_MOST - turn->faults;
        int count = uffd_read_msgs(fast->uffd, messages, (int)(room < most ? room : most));
        if (count < 0)
            turn->error = count;
        if (count <= 0)
            break;
        left = serve_all(fast, messages, (uint32_t)count, turn);
        turn->in_a_row++;
        if (!left && uffd_poll_us(fast->uffd, grace_us) <= 0)
            break;
    }
    place_rest(fast, turn);
    return left;
}
