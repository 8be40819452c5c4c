/* A new, nearly empty process: clone3 with a chosen pid, and execveat of a tiny static program.
 *
 * CLONE_VM|CLONE_VFORK makes this take 0.1 ms at any size of the caller, where a fork would copy
 * its page tables (19 ms at 1 GB). The assembly that enters the child is x86-64.
 */
#ifndef SNAP_SPAWN_H
#define SNAP_SPAWN_H

/* where it failed: spawn_request.failed */
#define SPAWN_CLONE 1   /* clone3 of the program: EEXIST when the pid is in use */
#define SPAWN_EXEC 2    /* a descriptor to keep is not open, or execveat */
#define SPAWN_INIT 3    /* clone3 of the pid namespace's init */
#define SPAWN_MOUNT 4   /* private mounts, /proc */

typedef struct {
    int program;     /* descriptor of a static executable; its argv is {"snap"}, no environment */
    int pid;         /* the wanted pid in the namespace where it is made; 0: any */
    const int *keep; /* descriptors that it inherits beside 0, 1 and 2 */
    int keep_count;
    int init;        /* descriptor of an executable for pid 1 of a new pid namespace; -1: none.
                        pid 1 is the parent of the program, has a mount namespace with its own
                        /proc, and no descriptor at all */
    int pidfd;       /* out: of the program, or of init when there is one */
    int failed;      /* out: SPAWN_* when an error is returned */
} spawn_request;

/* -> pid (seen from here) of the program, or of init when there is one; -errno.
 *
 * On return the program runs: every signal but SIGTRAP blocked, no handler, nothing ignored, and
 * SIGKILL when its parent's thread ends (PR_SET_PDEATHSIG; not init). The program is a child that
 * must be waited for. The caller guarantees that the descriptors stay open during the call; other
 * threads of the caller run on. */
int spawn(spawn_request *request);

/* fork(2) that shares the descriptor table with the caller (CLONE_FILES): what either opens or is
 * given by the kernel, both have, and it stays open until both have ended or exec'ed. -> pid in the
 * caller, 0 in the child, -errno. The caller guarantees that it has one thread only. */
int spawn_twin(void);

#endif
