/* What nobody waits for: decoders are asked for runs of chunks, and what they have done is put in place. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "fast_path_internal.h"

typedef struct {
    uint32_t slot, chunks;
    uint64_t address;
} request;

typedef struct {
    uint32_t slot, good;
    uint16_t present[SNAP_FAST_RUN];
} answer;

void fast_note(snap_fast_path *fast, uint32_t chunk, bool todo)
{
    uint64_t *word = &fast->todo[chunk / 64], bit = 1ull << chunk % 64;
    if (todo == !!(*word & bit))
        return;
    *word ^= bit;
    fast->todo_count += todo ? 1 : -1u;
}

static bool is_todo(const snap_fast_path *fast, uint32_t chunk)
{
    return chunk < snap_stored_count(fast->stored) && fast->todo[chunk / 64] >> chunk % 64 & 1;
}

/* The first from `chunk` on, and around; there is one. */
static uint32_t next_todo(const snap_fast_path *fast, uint32_t chunk)
{
    uint32_t words = snap_stored_count(fast->stored) / 64 + 1, at = chunk / 64;
    uint64_t word = fast->todo[at] & ~0ull << chunk % 64;
    while (!word) {
        at = at + 1 < words ? at + 1 : 0;
        word = fast->todo[at];
    }
    return at * 64 + (uint32_t)__builtin_ctzll(word);
}

static bool follows(const snap_fast_path *fast, uint32_t chunk)
{
    return is_todo(fast, chunk) && snap_stored_address(fast->stored, chunk) ==
                                       snap_stored_address(fast->stored, chunk - 1) + CHUNK;
}

/* The next run to ask for. -> how many chunks; 0: none */
static uint32_t choose(snap_fast_path *fast, uint32_t *first)
{
    uint32_t chunks = 1;
    while (fast->order_at < fast->order_count) {
        *first = fast->order[fast->order_at++];
        if (!is_todo(fast, *first))
            continue;
        while (chunks < SNAP_FAST_RUN && fast->order_at < fast->order_count &&
               fast->order[fast->order_at] == *first + chunks && follows(fast, *first + chunks)) {
            fast->order_at++;
            chunks++;
        }
        return chunks;
    }
    if (!fast->todo_count)
        return 0;
    *first = next_todo(fast, fast->cursor);
    while (chunks < SNAP_FAST_RUN && follows(fast, *first + chunks))
        chunks++;
    fast->cursor = *first + chunks < snap_stored_count(fast->stored) ? *first + chunks : 0;
    return chunks;
}

static fast_slot *free_slot(snap_fast_path *fast, uint32_t decoder, uint32_t *number, uint32_t *room)
{
    fast_slot *found = NULL;
    *room = 0;
    for (uint32_t i = decoder * fast->each; i < (decoder + 1) * fast->each; i++)
        if (fast->slot[i].state == SLOT_FREE) {
            ++*room;
            found = &fast->slot[i];
            *number = i;
        }
    return found;
}

/* The slot of the decoder that has least to do. */
static fast_slot *best_slot(snap_fast_path *fast, uint32_t *number, uint32_t *decoder)
{
    fast_slot *best = NULL;
    uint32_t most = 0;
    for (uint32_t i = 0; i < fast->decoders; i++) {
        uint32_t at = 0, room;
        fast_slot *slot = fast->decoder[i].ended ? NULL : free_slot(fast, i, &at, &room);
        if (slot && room > most)
            best = slot, most = room, *number = at, *decoder = i;
    }
    return best;
}

static void ask_again(snap_fast_path *fast, fast_slot *slot)
{
    for (uint32_t i = 0; i < slot->chunks; i++)
        if (fast->wanted[slot->first + i] & ALL)
            fast_note(fast, slot->first + i, true);
    slot->state = SLOT_FREE;
}

void fast_stream_ask(snap_fast_path *fast)
{
    uint32_t number = 0, decoder = 0;
    fast_slot *slot;
    while ((fast->todo_count || fast->order_at < fast->order_count) && (slot = best_slot(fast, &number, &decoder))) {
        uint32_t first, chunks = choose(fast, &first);
        if (!chunks)
            return;
        *slot = (fast_slot){.state = SLOT_ASKED, .first = first, .chunks = chunks};
        for (uint32_t i = 0; i < chunks; i++)
            fast_note(fast, first + i, false);
        request asked = {number | SNAP_FAST_OWN, chunks, snap_stored_address(fast->stored, first)};
        fast->asked++;
        if (write(fast->decoder[decoder].requests, &asked, sizeof asked) != sizeof asked) {
            fast->asked--; /* it has ended, and its answers say so */
            ask_again(fast, slot);
            return;
        }
    }
}

uint32_t fast_stream_waits(snap_fast_path *fast, struct pollfd *waits)
{
    for (uint32_t i = 0; i < fast->decoders; i++)
        waits[i] = (struct pollfd){.fd = fast->decoder[i].ended ? -1 : fast->decoder[i].answers, .events = POLLIN};
    return fast->decoders;
}

static void lost(snap_fast_path *fast, uint32_t decoder)
{
    fast->decoder[decoder].ended = true;
    for (uint32_t i = decoder * fast->each; i < (decoder + 1) * fast->each; i++)
        if (fast->slot[i].state == SLOT_ASKED) {
            fast->asked--;
            ask_again(fast, &fast->slot[i]);
        }
}

static void heard(snap_fast_path *fast, uint32_t decoder, const answer *one)
{
    uint32_t number = one->slot & ~SNAP_FAST_OWN;
    if (number == one->slot || number / fast->each != decoder || fast->slot[number].state != SLOT_ASKED)
        return;
    fast_slot *slot = &fast->slot[number];
    slot->state = SLOT_READY;
    slot->good = one->good < slot->chunks ? one->good : slot->chunks;
    memcpy(slot->present, one->present, sizeof slot->present);
    fast->ready[(fast->ready_first + fast->ready_count++) % FAST_SLOTS] = number;
    fast->asked--;
}

void fast_stream_hear(snap_fast_path *fast, const struct pollfd *waits, snap_fast_turn *turn)
{
    answer answers[FAST_SLOTS];
    for (uint32_t i = 0; i < fast->decoders; i++) {
        if (!waits[i].revents)
            continue;
        ssize_t got = read(fast->decoder[i].answers, answers, sizeof answers);
        if (got < 0 && errno == EAGAIN)
            continue;
        if (got <= 0) {
            lost(fast, i);
            turn->lost |= 1u << i;
        }
        for (ssize_t at = 0; (at + 1) * (ssize_t)sizeof *answers <= got; at++)
            heard(fast, i, &answers[at]);
    }
}

/* -> 0, or -errno: the chunk is as it was. */
static int put_chunk(snap_fast_path *fast, const fast_slot *slot, const char *data, snap_fast_turn *turn)
{
    uint32_t chunk = slot->first + slot->done, wanted = fast->wanted[chunk] & ALL;
    uint32_t present = slot->present[slot->done], pages = wanted & present;
    uffd_filled filled;
    if (pages) {
        int error = uffd_fill(fast->uffd, snap_stored_address(fast->stored, chunk), data, pages, present, &filled);
        turn->filled += filled.copied + filled.zeroed;
        if (error)
            return error;
    }
    fast_dealt_with(fast, chunk, wanted, pages, turn); /* what the image does not have is left alone */
    return 0;
}

void fast_stream_put(snap_fast_path *fast, bool all, snap_fast_turn *turn)
{
    if (!fast->ready_count)
        return;
    uint32_t number = fast->ready[fast->ready_first];
    fast_slot *slot = &fast->slot[number];
    for (bool begun = false; slot->done < slot->good; slot->done++, begun = true) {
        if (begun && !all && uffd_poll(fast->uffd, 0))
            return;
        int error = put_chunk(fast, slot, fast->memory + ((size_t)number * SNAP_FAST_RUN + slot->done) * CHUNK, turn);
        if (error) {
            if (error != -EAGAIN) /* an event is to be read first */
                turn->error = error;
            return;
        }
    }
    slot->state = SLOT_FREE; /* what could not be decoded is still wanted, and not asked for again */
    fast->ready_first = (fast->ready_first + 1) % FAST_SLOTS;
    fast->ready_count--;
}

bool fast_stream_works(const snap_fast_path *fast)
{
    if (!fast->decoders)
        return false;
    bool any = false;
    for (uint32_t i = 0; i < fast->decoders; i++)
        any |= !fast->decoder[i].ended;
    return fast->ready_count || fast->asked || (any && fast->todo_count);
}

int snap_fast_path_stream(snap_fast_path *fast, char *memory, uint32_t count, uint32_t each, const int *requests,
                          const int *answers)
{
    if (count > FAST_DECODERS || count * each > FAST_SLOTS)
        return -EINVAL;
    fast->memory = memory, fast->decoders = count, fast->each = each;
    for (uint32_t i = 0; i < count; i++)
        fast->decoder[i] = (fast_decoder){requests[i], answers[i], answers[i] < 0};
    return 0;
}

void snap_fast_path_alone(snap_fast_path *fast)
{
    fast->decoders = fast->asked = fast->ready_count = 0;
    memset(fast->slot, 0, sizeof fast->slot);
}

int snap_fast_path_first(snap_fast_path *fast, const uint64_t *addresses, uint32_t count)
{
    uint32_t *order = malloc((count + 1) * sizeof *order), found = 0;
    if (!order)
        return -ENOMEM;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t chunk = snap_stored_from(fast->stored, addresses[i]);
        if (chunk < snap_stored_count(fast->stored) && snap_stored_address(fast->stored, chunk) == addresses[i])
            order[found++] = chunk;
    }
    free(fast->order);
    fast->order = order, fast->order_count = found, fast->order_at = 0;
    return 0;
}
