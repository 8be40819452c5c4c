#define _GNU_SOURCE
#include "fast_path.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#include "fast_path_internal.h"

#define PLACED(pages) ((uint32_t)(pages) << 16)

snap_fast_path *snap_fast_path_new(snap_stored *stored, int uffd)
{
    uint32_t count = snap_stored_count(stored);
    snap_fast_path *fast = calloc(1, sizeof *fast);
    if (!fast)
        return NULL;
    fast->stored = stored, fast->uffd = uffd;
    fast->wanted = calloc(count + 1, sizeof *fast->wanted);
    fast->todo = calloc(count / 64 + 1, sizeof *fast->todo);
    if (!fast->wanted || !fast->todo) {
        snap_fast_path_free(fast);
        return NULL;
    }
    return fast;
}

void snap_fast_path_free(snap_fast_path *fast)
{
    if (!fast)
        return;
    free(fast->wanted);
    free(fast->todo);
    free(fast->order);
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
        if (wanted || !(fast->wanted[i] & ALL))
            fast_note(fast, i, wanted);
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

void fast_dealt_with(snap_fast_path *fast, uint32_t chunk, uint32_t pages, uint32_t placed, snap_fast_turn *turn)
{
    uint64_t base = snap_stored_address(fast->stored, chunk);
    fast->wanted[chunk] = (fast->wanted[chunk] & ~pages) | PLACED(placed);
    if (!(fast->wanted[chunk] & ALL))
        fast_note(fast, chunk, false);
    for (uint32_t page = 0; page < PAGES; page++) {
        uint64_t at = base + page * PAGE;
        if (!(pages >> page & 1))
            continue;
        if (turn->count && turn->ranges[turn->count - 1].end == at)
            turn->ranges[turn->count - 1].end += PAGE;
        else
            turn->ranges[turn->count++] = (snap_fast_range){at, at + PAGE};
    }
}

/* -> 0: the pages are dealt with, and on record; or -errno. */
static int place(snap_fast_path *fast, uint32_t chunk, uint32_t pages, uint32_t present, snap_fast_turn *turn)
{
    uffd_filled filled;
    int error = uffd_fill(fast->uffd, snap_stored_address(fast->stored, chunk), fast->pages, pages, present, &filled);
    turn->filled += filled.copied + filled.zeroed;
    if (!error)
        fast_dealt_with(fast, chunk, pages, pages, turn);
    return error;
}

/* What comes with the page that was served last, and when nobody waits all of its chunk. Only while no event has
 * been read since: which pages are wanted at all may be another thing after it. */
static void place_rest(snap_fast_path *fast, bool all, snap_fast_turn *turn)
{
    if (!fast->rest.present)
        return;
    uint32_t wanted = fast->wanted[fast->rest.chunk] & ALL, known = fast->rest.known;
    if (all && wanted & ~known && snap_stored_finish(fast->stored, fast->pages))
        known = ALL;
    if (wanted & known)
        place(fast, fast->rest.chunk, wanted & known, fast->rest.present, turn);
    fast->rest.present = 0;
}

static bool bring(snap_fast_path *fast, uint32_t chunk, uint32_t page, snap_fast_turn *turn)
{
    uint32_t present, known = snap_stored_decode(fast->stored, chunk, page, fast->pages, &present);
    if (!(known >> page & 1) || place(fast, chunk, 1u << page, present, turn))
        return false;
    fast->rest.chunk = chunk, fast->rest.known = known, fast->rest.present = present;
    return true;
}

/* -> whether nobody waits for the page any more. */
static bool serve(snap_fast_path *fast, uint64_t address, snap_fast_turn *turn)
{
    uint64_t base = address & ~(uint64_t)(CHUNK - 1);
    uint32_t page = (uint32_t)((address - base) / PAGE), i = snap_stored_from(fast->stored, base);
    if (i == snap_stored_count(fast->stored) || snap_stored_address(fast->stored, i) != base)
        return false;
    bool done = false;
    if (fast->wanted[i] & PLACED(1u << page)) /* it came between the fault and this */
        done = !uffd_wake(fast->uffd, base + page * PAGE, PAGE);
    else if (fast->wanted[i] >> page & 1)
        done = bring(fast, i, page, turn);
    if (done) {
        turn->chunks[turn->faults++] = base;
        fast->cursor = i;
    }
    return done;
}

/* -> how many of `count` messages are left. */
static uint32_t serve_all(snap_fast_path *fast, uffd_message *messages, uint32_t count, snap_fast_turn *turn)
{
    uint32_t left = 0;
    for (uint32_t i = 0; i < count; i++)
        if (messages[i].event != UFFD_EVENT_PAGEFAULT) {
            fast->rest.present = 0;
            return count;
        }
    for (uint32_t i = 0; i < count; i++) {
        place_rest(fast, false, turn);
        if (!serve(fast, messages[i].arg[1], turn))
            messages[left++] = messages[i];
    }
    return left;
}

/* -> messages that are left. *flood: somebody waits again, within the grace. */
static uint32_t serve_waiting(snap_fast_path *fast, uffd_message *messages, uint32_t most, uint32_t grace_us,
                              bool *flood, snap_fast_turn *turn)
{
    uint32_t room = SNAP_FAST_FAULTS - turn->faults;
    int count = uffd_read_msgs(fast->uffd, messages, (int)(room < most ? room : most));
    if (count < 0)
        turn->error = count;
    if (count <= 0)
        return 0;
    uint32_t left = serve_all(fast, messages, (uint32_t)count, turn);
    *flood = !left && uffd_poll_us(fast->uffd, grace_us) > 0;
    place_rest(fast, !*flood, turn);
    return left;
}

int snap_fast_path_watch(snap_fast_path *fast, const int *descriptors, uint32_t count)
{
    if (count > FAST_OTHERS)
        return -EINVAL;
    for (uint32_t i = 0; i < count; i++)
        fast->other[i] = descriptors[i];
    fast->others = count;
    return 0;
}

/* -> poll's; the userfaultfd is waits[0], then come `decoders`. */
static int wait_for_any(snap_fast_path *fast, int timeout_ms, uint32_t *decoders, snap_fast_turn *turn)
{
    fast->waits[0] = (struct pollfd){.fd = fast->uffd, .events = POLLIN};
    *decoders = fast_stream_waits(fast, fast->waits + 1);
    struct pollfd *others = fast->waits + 1 + *decoders;
    for (uint32_t i = 0; i < fast->others; i++)
        others[i] = (struct pollfd){.fd = fast->other[i], .events = POLLIN};
    int ready = poll(fast->waits, 1 + *decoders + fast->others, timeout_ms);
    for (uint32_t i = 0; ready > 0 && i < fast->others; i++)
        turn->others += others[i].revents != 0;
    return ready;
}

uint32_t snap_fast_path_turn(snap_fast_path *fast, int timeout_ms, uffd_message *messages, uint32_t most,
                             uint32_t grace_us, snap_fast_turn *turn)
{
    enum {
        HOLES = PAGES / 2, /* ranges of a chunk, at most */
        /* That the caller accounts for in a tenth of a millisecond: meanwhile nobody is served. */
        ENOUGH = 24,
    };
    _Static_assert(ENOUGH + SNAP_FAST_FAULTS * (1 + HOLES) + SNAP_FAST_RUN * HOLES <=
                       sizeof turn->ranges / sizeof *turn->ranges, "no room for what one step can add");
    uint32_t left = 0, decoders;
    turn->faults = turn->filled = turn->others = turn->lost = turn->count = 0;
    turn->error = 0;
    do {
        fast_stream_ask(fast);
        int ready = wait_for_any(fast, fast->ready_count ? 0 : timeout_ms, &decoders, turn);
        if (ready < 0 || (!ready && !fast->ready_count))
            break;
        bool flood = false;
        if (fast->waits[0].revents)
            left = serve_waiting(fast, messages, most, grace_us, &flood, turn);
        fast_stream_hear(fast, fast->waits + 1, turn);
        if (!left && !turn->error)
            fast_stream_put(fast, flood, turn);
    } while (!left && !turn->error && !turn->others && !turn->lost && turn->faults < SNAP_FAST_FAULTS &&
             turn->count < ENOUGH && fast_stream_works(fast));
    turn->streams = fast_stream_works(fast);
    return left;
}
