/* requests: a client of redis with an open loop. A request is due at its time whether or not those
 * before it were answered, and its latency counts from there: so a stall is seen as long as it was.
 *
 *   --socket PATH  --rate N  --seconds S  --keys K  --log PATH
 *   --get 1            GET instead of SET
 *   --closed 1         a request is due when the one before it is answered, whatever the rate
 *   --fill 1           SET every key once, in order, not at random
 *   --connections N    the requests go through them in turn (16)
 *   --watch PID        how long the server's main thread ran, and waited for a CPU
 *
 * Waits until there is a server. Ends after the seconds, or at SIGTERM, when all is answered. Then
 * LOG holds three numbers for each request: due, sent, answered; LOG.watch: at, ran, waited,
 * stolen (from all CPUs, by the host). All are 64 bits, ns, times CLOCK_MONOTONIC. It runs before all
 * ordinary threads, and before the urgent one of a take (SCHED_FIFO, 2), where that is allowed: a
 * client on another machine would not wait for this one's threads either. */
#define _GNU_SOURCE
#include "common.h"

#include <fcntl.h>
#include <sched.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define WATCH_NS 1000000UL      /* between two looks, which cost 20 us or so */
#define LATE_NS 1000000UL
#define GIVEN_UP_NS (60 * SECOND)
#define LARGEST 4096
#define CONNECTIONS 64
#define POOL (1 << 20)

struct request { uint64_t due, sent, answered; };
struct watched { uint64_t at, ran, waited, stolen; };
struct connection {
    int fd;
    char *out;                  /* what the socket has not taken yet */
    size_t filled, room;
    uint64_t answered;          /* of the requests that went this way */
    size_t skip;                /* bytes of a value that are still to come */
    char line[64];
    size_t length;
    bool wants_out;
};

static int arguments;
static char **argument;
static struct connection connections[CONNECTIONS];
static size_t ways;
static struct request *requests;
static uint64_t issued, answered, wanted;
static struct watched *watched;
static uint64_t watches, watches_most, last_watch, tick_ns;
static int watch_fd = -1, stat_fd, poll_fd;
static uint64_t keys;
static bool get, filling, closed;
static char pool[POOL];

static const char *option(const char *name, const char *otherwise)
{
    for (int i = 1; i + 1 < arguments; i += 2)
        if (strncmp(argument[i], "--", 2) == 0 && strcmp(argument[i] + 2, name) == 0)
            return argument[i + 1];
    return otherwise;
}

static uint64_t number(const char *name, const char *otherwise)
{
    return strtoull(option(name, otherwise), NULL, 10);
}

static uint64_t mix(uint64_t x)
{
    x ^= x >> 30; x *= 0xbf58476d1ce4e5b9ULL;
    x ^= x >> 27; x *= 0x94d049bb133111ebULL;
    return x ^ (x >> 31);
}

static int reach(const char *path)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    uint64_t since = now_ns();

    must(strlen(path) < sizeof address.sun_path, path);
    strcpy(address.sun_path, path);
    for (;;) {
        int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        must(fd >= 0, "socket");
        if (connect(fd, (struct sockaddr *)&address, sizeof address) == 0) {
            must(fcntl(fd, F_SETFL, O_NONBLOCK) == 0, "O_NONBLOCK");
            return fd;
        }
        must(now_ns() - since < GIVEN_UP_NS && !stopping, path);
        close(fd);
        nanosleep(&(struct timespec){ 0, 200000 }, NULL);
    }
}

static bool look(int fd, char *text, size_t size)
{
    ssize_t got = pread(fd, text, size - 1, 0);
    text[got > 0 ? got : 0] = '\0';
    return got > 0;
}

static void watch(uint64_t now)
{
    unsigned long long ran, waited, ticks;
    char text[128];

    if (watch_fd < 0 || watches == watches_most || !look(watch_fd, text, sizeof text)
        || sscanf(text, "%llu %llu", &ran, &waited) != 2 || !look(stat_fd, text, sizeof text)
        || sscanf(text, "cpu %*u %*u %*u %*u %*u %*u %*u %llu", &ticks) != 1)
        return;
    watched[watches++] = (struct watched){ now, ran, waited, ticks * tick_ns };
}

static void flush(struct connection *way)
{
    size_t done = 0;

    while (done < way->filled) {
        ssize_t sent = send(way->fd, way->out + done, way->filled - done, MSG_NOSIGNAL);
        if (sent < 0 && errno == EAGAIN)
            break;
        must(sent > 0, "sending");
        done += (size_t)sent;
    }
    memmove(way->out, way->out + done, way->filled - done);
    way->filled -= done;
    bool more = way->filled > 0;
    if (more != way->wants_out) {
        struct epoll_event event = { .events = EPOLLIN | (more ? EPOLLOUT : 0), .data.ptr = way };
        must(epoll_ctl(poll_fd, EPOLL_CTL_MOD, way->fd, &event) == 0, "epoll_ctl");
        way->wants_out = more;
    }
}

static void issue(void)
{
    struct connection *way = &connections[issued % ways];
    uint64_t random = mix((issued + 1) * 0x9e3779b97f4a7c15ULL), key = filling ? issued : random % keys;
    char name[32];
    int length = snprintf(name, sizeof name, "key:%llu", (unsigned long long)key);

    if (way->filled + 2 * LARGEST > way->room) {
        way->room = 2 * way->room + 4 * LARGEST;
        way->out = realloc(way->out, way->room);
        must(way->out != NULL, "memory");
    }
    char *to = way->out + way->filled;
    if (get) {
        to += sprintf(to, "*2\r\n$3\r\nGET\r\n$%d\r\n%s\r\n", length, name);
    } else {
        size_t size = 512 + key * 7919 % 3584;  /* what tests/harness/redis.py gave it */
        to += sprintf(to, "*3\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%zu\r\n", length, name, size);
        memcpy(to, pool + random % (POOL - LARGEST), size);
        memcpy(to + size, "\r\n", 2);
        to += size + 2;
    }
    way->filled = (size_t)(to - way->out);
    requests[issued++].sent = now_ns();
    flush(way);
}

static void reply(struct connection *way, uint64_t now)
{
    struct request *one = &requests[way->answered * ways + (uint64_t)(way - connections)];

    way->answered++;
    answered++;
    one->answered = now;
    if (now - one->due > LATE_NS && now - last_watch > WATCH_NS / 4) {
        watch(now);
        last_watch = now;
    }
}

static void parse(struct connection *way, const char *data, size_t size, uint64_t now)
{
    for (size_t i = 0; i < size; i++) {
        if (way->skip) {
            size_t step = way->skip < size - i ? way->skip : size - i;
            way->skip -= step;
            i += step - 1;
            if (!way->skip)
                reply(way, now);
            continue;
        }
        must(way->length < sizeof way->line - 1, "a reply that is too long");
        way->line[way->length++] = data[i];
        if (data[i] != '\n')
            continue;
        way->line[way->length] = '\0';
        way->length = 0;
        if (way->line[0] == '$' && way->line[1] != '-') {
            way->skip = strtoull(way->line + 1, NULL, 10) + 2;
            continue;
        }
        must(way->line[0] == '+' || way->line[0] == '$', way->line);
        reply(way, now);
    }
}

static void receive(struct connection *way)
{
    static char data[256 * 1024];

    for (;;) {
        ssize_t got = recv(way->fd, data, sizeof data, 0);
        if (got < 0 && errno == EAGAIN)
            return;
        must(got > 0, "the server ended");
        parse(way, data, (size_t)got, now_ns());
        if ((size_t)got < sizeof data)
            return;
    }
}

static void run(uint64_t rate)
{
    struct epoll_event events[CONNECTIONS];
    uint64_t begin = now_ns();

    for (uint64_t i = 0; i < wanted; i++)
        requests[i].due = begin + (closed ? 0 : i * SECOND / rate);
    while (answered < issued || (issued < wanted && !stopping)) {
        uint64_t now = now_ns();
        bool more = issued < wanted && !stopping && !(closed && answered < issued);
        must(now - begin < (wanted / rate + 120) * SECOND, "answers are missing");
        if (closed && more)
            requests[issued].due = now;
        if (more && requests[issued].due <= now) {
            issue();
            continue;
        }
        if (now - last_watch > WATCH_NS) {
            watch(now);
            last_watch = now;
        }
        uint64_t left = more ? requests[issued].due - now : SECOND;
        struct timespec most = { (time_t)(left / SECOND), (long)(left % SECOND) };
        int found = epoll_pwait2(poll_fd, events, CONNECTIONS, &most, NULL);
        for (int i = 0; i < found; i++) {
            if (events[i].events & EPOLLOUT)
                flush(events[i].data.ptr);
            if (events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR))
                receive(events[i].data.ptr);
        }
    }
}

static void save(const char *path, const char *suffix, const void *data, size_t size, size_t count)
{
    char name[512];

    snprintf(name, sizeof name, "%s%s", path, suffix);
    FILE *to = fopen(name, "we");
    must(to != NULL && fwrite(data, size, count, to) == count && fclose(to) == 0, name);
}

/* Words, numbers and punctuation, as values are more often than random bytes are. */
static void write_text(void)
{
    size_t at = 0;

    for (uint64_t i = 1; at < POOL - 32; i++) {
        uint64_t chance = mix(i * 0x9e3779b97f4a7c15ULL), word = chance % 1000;
        for (unsigned once_more = 0; once_more < 3; once_more++)    /* some are more common */
            word = word < mix(chance + once_more + 1) % 1000 ? word : mix(chance + once_more + 1) % 1000;
        uint64_t left = 3 + mix(word) % 9;
        if (i % 8 == 0)
            at += (size_t)sprintf(pool + at, "\"%llu\", ", (unsigned long long)(mix(i) % 1000000));
        for (; left; left--)
            pool[at++] = (char)('a' + mix(word * 16 + left) % 26);
        pool[at++] = ' ';
    }
    memset(pool + at, ' ', POOL - at);
}

int main(int argc, char **argv)
{
    arguments = argc;
    argument = argv;
    signal(SIGTERM, stop);
    prctl(PR_SET_TIMERSLACK, 1);
    uint64_t rate = number("rate", "5000");
    wanted = rate * number("seconds", "10");
    keys = number("keys", "1");
    get = number("get", "0") != 0;
    closed = number("closed", "0") != 0;
    ways = number("connections", "16");
    must(rate && keys && ways && ways <= CONNECTIONS, "an option");
    filling = number("fill", "0") != 0;
    if (filling)
        wanted = keys;
    write_text();
    requests = calloc(wanted + 1, sizeof *requests);
    watches_most = 3 * wanted + 4096;
    watched = calloc(watches_most, sizeof *watched);
    must(requests != NULL && watched != NULL, "memory");
    memset(watched, 1, watches_most * sizeof *watched);     /* not for the first time later */
    poll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (number("watch", "0")) {
        char path[64];
        snprintf(path, sizeof path, "/proc/%s/schedstat", option("watch", ""));
        watch_fd = open(path, O_RDONLY | O_CLOEXEC);
        stat_fd = open("/proc/stat", O_RDONLY | O_CLOEXEC);
        tick_ns = SECOND / (uint64_t)sysconf(_SC_CLK_TCK);
    }
    struct sched_param first = { .sched_priority = 2 };
    sched_setscheduler(0, SCHED_FIFO, &first);
    for (size_t i = 0; i < ways; i++) {
        struct epoll_event event = { .events = EPOLLIN, .data.ptr = &connections[i] };
        connections[i].fd = reach(option("socket", ""));
        must(epoll_ctl(poll_fd, EPOLL_CTL_ADD, connections[i].fd, &event) == 0, "epoll_ctl");
    }
    run(rate);
    save(option("log", "requests.log"), "", requests, sizeof *requests, issued);
    save(option("log", "requests.log"), ".watch", watched, sizeof *watched, watches);
    return 0;
}
