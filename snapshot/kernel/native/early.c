/* Single pages that are kept before their chunk is saved. After T0: because somebody waits to write to
 * them. A chunk is saved by the sweep in its turn, and what was kept of it is put in then. So who
 * writes here and there waits for 4 KiB and not for 64, staging holds 4, and every chunk is stored once.
 * And ahead of T0, where writers wait for nobody: what was written since its chunk was copied. Of that only
 * the newest is kept, and handed out after T0, so that the store has one patch of a chunk at most.
 *
 * When cells get scarce the sweep goes where they are: in the order of memory it would come to most of them
 * at its end, and they would have to be written to the spill file, which lets nobody go on for as long as
 * the disk is busy with the store.
 *
 * A cell is a page of staging or of the spill file. Cells are cut from whole slots, which stay cells:
 * pages that were kept together are not given back together. */
#define _GNU_SOURCE
#include "pump_internal.h"

#include <errno.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#define MOST_EARLY 12     /* pages of a chunk; then all of it is saved */
#define SCARCE 4          /* when a quarter of what staging may hold is in use */
#define SWEEP_SLOTS 512   /* 32 MiB: what storing threads have, what waits for them, and a step */

/* ---- cells -------------------------------------------------------------------------------------- */

/* Slots of staging for cells: the sweep needs some too, and there is the reserve. */
static uint64_t most_slots(const snap_pump *p)
{
    uint64_t others = SWEEP_SLOTS + least_reserve(p), half = p->slots / 2;
    return p->slots > others + half ? p->slots - others : half;
}

static free_cells *free_like(snap_pump *p, int64_t cell)
{
    return &p->free_early[cell < 0];
}

static void put_in(snap_pump *p, uint32_t number)
{
    early_page *one = &p->early.at[number - 1];
    free_cells *list = free_like(p, one->cell);
    one->next = list->first;
    list->first = number;
    list->count++;
}

/* As many as there is memory to remember. */
static void cut(snap_pump *p, int64_t slot)
{
    for (int64_t i = 0; i < CHUNK_PAGES; i++) {
        early_page *one = VECTOR_PUSH(&p->early);
        if (!one)
            return;
        one->cell = slot >= 0 ? slot * CHUNK_PAGES + i : (slot + 1) * CHUNK_PAGES - i - 1;
        put_in(p, (uint32_t)p->early.count);
    }
}

static bool cut_staging(snap_pump *p)
{
    int64_t slot = p->cut_slots < most_slots(p) ? take_place(p, 0, false, true) : NO_PLACE;
    if (slot == NO_PLACE)
        return false;
    for (uint64_t at = 0; p->passes && at < CHUNK; at += PAGE) /* not in the pause: it takes longer than the copy */
        ((volatile uint8_t *)p->staging)[(uint64_t)slot * CHUNK + at] = 0;
    p->cut_slots++;
    cut(p, slot);
    return true;
}

/* So many free cells of staging, if they are to be had. */
static void make_ready(snap_pump *p, uint64_t count)
{
    while (free_like(p, 0)->count < count && cut_staging(p))
        continue;
}

/* Cells of staging that are left to the pause. */
static uint64_t left_alone(const snap_pump *p)
{
    return p->passes && !p->held && !p->at_t0 ? MOST_AT_ONCE : 0;
}

/* The number of a free one, 0: none, and nothing that one could be cut from. */
static uint32_t take_cell(snap_pump *p)
{
    free_cells *list = free_like(p, 0);
    make_ready(p, left_alone(p) + 1);
    if (list->count <= left_alone(p)) {
        list = free_like(p, -1);
        int64_t slot = list->first ? NO_PLACE : take_spill(p);
        if (slot != NO_PLACE)
            cut(p, slot);
    }
    uint32_t number = list->first;
    if (number) {
        list->first = p->early.at[number - 1].next;
        list->count--;
        p->early_used++;
    }
    return number;
}

/* They may have been cut long ago: kernel/warm.py says what that costs. */
void early_ready(snap_pump *p)
{
    make_ready(p, MOST_AT_ONCE);
    uint32_t number = free_like(p, 0)->first;
    for (unsigned i = 0; i < MOST_AT_ONCE && number; i++) {
        const early_page *one = &p->early.at[number - 1];
        (void)((volatile uint8_t *)p->staging)[(uint64_t)one->cell * PAGE];
        number = one->next;
    }
}

static void give_cell(snap_pump *p, uint32_t number)
{
    put_in(p, number);
    p->early_used--;
}

static off_t spilled_at(int64_t cell)
{
    return (off_t)((uint64_t)(-cell - 1) * PAGE);
}

/* ---- pages -------------------------------------------------------------------------------------- */

bool may_be_early(const snap_window *w, const chunk *c)
{
    return !w->huge && w->object < 0 && c && is_unsaved(c) &&
           __builtin_popcount(c->early) < MOST_EARLY;
}

int save_early(snap_pump *p, uint32_t space, uint64_t at)
{
    uint64_t address = at & ~(CHUNK - 1);
    unsigned page = (unsigned)(at % CHUNK / PAGE);
    uint16_t bit = (uint16_t)(1u << page);
    const chunk *c = ledger_chunk(p, space, address);
    if (!(pages_to_save(space, c) & bit) || c->early & bit)
        return 0; /* nobody will need it, or there is a copy of it */
    tentative *t = VECTOR_PUSH(&p->tentative);
    if (!t)
        return -ENOMEM;
    uint32_t number = take_cell(p);
    int r = number ? 0 : -ENOBUFS;
    if (!r) {
        int64_t cell = p->early.at[number - 1].cell;
        uint8_t *out = cell >= 0 ? p->staging + (uint64_t)cell * PAGE : p->bounce;
        r = copy_pages(p, space, address, bit, out - page * PAGE, &t->low, &t->high);
        if (!r && cell < 0 && pwrite(p->spill, out, PAGE, spilled_at(cell)) != (ssize_t)PAGE)
            r = -ENOBUFS; /* the disk is full */
        if (r)
            give_cell(p, number);
    }
    if (r) {
        p->tentative.count--;
        return r;
    }
    t->only = false;
    t->early = number;
    t->saved = (snap_saved){.address = address, .space = space, .pages = bit};
    pthread_mutex_lock(&p->lock);
    p->counters.fault_pages++;
    pthread_mutex_unlock(&p->lock);
    return 0;
}

/* The cell of this number has the page `bit` of the chunk. */
static void add(snap_pump *p, chunk *c, uint32_t number, uint16_t bit)
{
    early_page *one = &p->early.at[number - 1];
    one->bit = bit;
    one->next = c->first_early;
    c->first_early = number;
    c->early |= bit;
}

/* The page at `data`, in a free cell -> its number, 0: there is none, or the disk is full. */
static uint32_t keep(snap_pump *p, const uint8_t *data)
{
    uint32_t number = take_cell(p);
    if (!number)
        return 0;
    int64_t cell = p->early.at[number - 1].cell;
    if (cell >= 0) {
        memcpy(p->staging + (uint64_t)cell * PAGE, data, PAGE);
    } else if (pwrite(p->spill, data, PAGE, spilled_at(cell)) != (ssize_t)PAGE) {
        give_cell(p, number);
        return 0;
    }
    return number;
}

int early_hold(snap_pump *p, uint32_t space, uint64_t address, chunk *c, uint16_t pages)
{
    int r = copy_as_is(p, space, address, pages, p->bounce);
    for (unsigned i = 0; !r && i < CHUNK_PAGES; i++) {
        if (!(pages >> i & 1))
            continue;
        uint32_t number = keep(p, p->bounce + i * PAGE);
        if (!number)
            return -ENOBUFS;
        add(p, c, number, (uint16_t)(1u << i));
    }
    return r;
}

/* One by one where that is not possible: some cannot be read so. */
static int hold_batch(snap_pump *p)
{
    batch *b = &p->batch;
    ssize_t got = b->count ? process_vm_readv(p->pid, b->here, b->count, b->there, b->count, 0) : 0;
    int r = 0;
    for (size_t i = 0; i < b->count; i++) {
        place of = b->pages[i].of;
        chunk *c = ledger_chunk(p, of.space, of.address);
        if (got == (ssize_t)(b->count * PAGE)) {
            add(p, c, b->pages[i].number, b->pages[i].bit);
            continue;
        }
        give_cell(p, b->pages[i].number);
        if (!r)
            r = early_hold(p, of.space, of.address, c, b->pages[i].bit);
    }
    b->count = 0;
    return r;
}

/* As many of the pages as cells of staging are to be had at once for. -> those that are left */
static uint16_t collect(snap_pump *p, place of, uint16_t pages)
{
    batch *b = &p->batch;
    uint64_t at[CHUNK_PAGES];
    if (find_pages(p, of.space, of.address, pages, at))
        return pages;
    for (unsigned i = 0; i < CHUNK_PAGES; i++) {
        if (!(pages >> i & 1))
            continue;
        uint32_t number = take_cell(p);
        int64_t cell = number ? p->early.at[number - 1].cell : -1;
        if (cell < 0) {
            if (number)
                give_cell(p, number);
            break;
        }
        b->here[b->count] = (struct iovec){p->staging + (uint64_t)cell * PAGE, PAGE};
        b->there[b->count] = (struct iovec){(void *)(uintptr_t)at[i], PAGE};
        b->pages[b->count].of = of;
        b->pages[b->count].number = number;
        b->pages[b->count++].bit = (uint16_t)(1u << i);
        pages &= (uint16_t)~(1u << i);
    }
    return pages;
}

int early_hold_listed(snap_pump *p)
{
    int r = 0;
    p->batch.count = 0;
    for (size_t i = 0; !r && i < p->listed.count; i++) {
        place of = p->listed.at[i];
        chunk *c = ledger_chunk(p, of.space, of.address);
        uint16_t left = is_unsaved(c) ? lacking(c) : 0;
        if (left && p->batch.count + CHUNK_PAGES > MOST_AT_ONCE)
            r = hold_batch(p);
        if (left && !r)
            left = collect(p, of, left);
        if (left && !r)
            r = early_hold(p, of.space, of.address, c, left);
        beat(p);
    }
    return r ? r : hold_batch(p);
}

void early_drop(snap_pump *p, chunk *c, uint16_t pages)
{
    for (uint32_t *link = &c->first_early; *link;) {
        uint32_t number = *link;
        early_page *one = &p->early.at[number - 1];
        if (!(one->bit & pages)) {
            link = &one->next;
            continue;
        }
        *link = one->next;
        give_cell(p, number);
    }
    c->early &= (uint16_t)~pages;
}

void early_publish(snap_pump *p, chunk *c, const tentative *t)
{
    if (c->state != UNSAVED || c->early & t->saved.pages) {
        give_cell(p, t->early); /* the chunk was saved as a whole after all, or it twice */
        return;
    }
    place *where = c->early ? NULL : VECTOR_PUSH(&p->early_chunks);
    if (where) /* without memory it waits for its turn */
        *where = (place){t->saved.address, t->saved.space};
    add(p, c, t->early, (uint16_t)t->saved.pages);
}

void early_forget(snap_pump *p, const tentative *t)
{
    give_cell(p, t->early);
}

int early_put(const snap_pump *p, const chunk *c, uint16_t pages, uint8_t *out)
{
    for (uint32_t at = c->first_early; at; at = p->early.at[at - 1].next) {
        const early_page *one = &p->early.at[at - 1];
        uint8_t *to = out + (unsigned)__builtin_ctz(one->bit) * PAGE;
        if (!(one->bit & pages))
            continue;
        if (one->cell >= 0)
            memcpy(to, p->staging + (uint64_t)one->cell * PAGE, PAGE);
        else if (pread(p->spill, to, PAGE, spilled_at(one->cell)) != (ssize_t)PAGE)
            return -EIO;
    }
    return 0;
}

void early_done(snap_pump *p, chunk *c)
{
    for (uint32_t at = c->first_early, next; at; at = next) {
        next = p->early.at[at - 1].next;
        give_cell(p, at);
    }
    c->first_early = 0;
    c->early = 0;
}

/* The missing pages of a chunk, all kept, as a patch of the copy before. */
static int hand_out(snap_pump *p, uint32_t space, uint64_t address, chunk *c)
{
    uint16_t pages = missing(c);
    int64_t place;
    if (pages & ~c->early)
        return -EPROTO; /* settle has seen to it that there is none */
    while (!free_places(p) || (place = take_place(p, pages == c->want ? 0 : pages, false, false)) == NO_PLACE)
        if (!wait_for_place(p))
            return -ECANCELED;
    int r = early_put(p, c, pages, p->staging + (uint64_t)place * CHUNK);
    if (r) {
        give_place(p, place);
        return r;
    }
    const snap_saved saved = {.address = address, .place = place, .space = space, .pages = c->want,
                              .patch = patch_of(c, pages)};
    early_done(p, c);
    c->state = SAVED;
    count_unsaved(p, space, -1);
    pthread_mutex_lock(&p->lock);
    r = enqueue(p, &saved);
    pthread_mutex_unlock(&p->lock);
    return r;
}

int early_hand_out(snap_pump *p)
{
    int r = 0;
    p->hurried = false;
    for (size_t k = 0; !r && k < p->blocks.count; k++) {
        block *b = p->blocks.at[k];
        for (unsigned i = 0; !r && i < BLOCK_CHUNKS; i++)
            if (is_unsaved(&b->chunks[i]))
                r = hand_out(p, b->space, b->start + i * CHUNK, &b->chunks[i]);
    }
    return r;
}

bool early_first(snap_pump *p, place *first)
{
    if (p->early_used < most_slots(p) * CHUNK_PAGES / SCARCE)
        return false;
    while (p->early_head < p->early_chunks.count) {
        *first = p->early_chunks.at[p->early_head++];
        const chunk *c = ledger_chunk(p, first->space, first->address);
        if (c->state == UNSAVED && c->early)
            return true;
    }
    return false;
}
