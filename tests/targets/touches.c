/* touches MIB: that much memory, filled. When a file "do" appears in its working directory it
 * reads a page of each of 60 chunks here and there, always the same, and makes a file "done" that
 * says how many were not as they were. "done" is there first when all is filled. */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define CHUNK 65536u
#define TOUCHES 60u

static uint64_t number(uint64_t at)
{
    return (at + 1) * 0x9E3779B97F4A7C15ull;
}

static void answer(unsigned wrong)
{
    FILE *file = fopen("done.new", "w");
    if (!file || fprintf(file, "%u", wrong) < 0 || fclose(file) || rename("done.new", "done"))
        exit(3);
}

int main(int argc, char **argv)
{
    size_t chunks = argc > 1 ? (size_t)atoi(argv[1]) << 4 : 0;
    char *memory = mmap(NULL, chunks * CHUNK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                        -1, 0);
    if (!chunks || memory == MAP_FAILED)
        return 2;
    for (size_t at = 0; at < chunks * CHUNK; at += sizeof(uint64_t))
        *(uint64_t *)(memory + at) = number(at);
    answer(0);
    for (;;) {
        struct timespec moment = {0, 1000000};
        unsigned wrong = 0;
        while (access("do", F_OK))
            nanosleep(&moment, NULL);
        for (unsigned i = 0; i < TOUCHES; i++) {
            /* 181 and the number of chunks have no common divisor: all are different */
            size_t at = (i * 181u + 7) % chunks * CHUNK + (i % 16) * 4096;
            wrong += *(uint64_t *)(memory + at) != number(at);
        }
        unlink("do");
        answer(wrong);
    }
}
