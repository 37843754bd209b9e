/* Frees, and replaces, what other threads are at work with, and takes the caller's memory away at
 * once; opens a library in a process and uses it in its fork:
 * lifetimes MODEL [TIMES [without-forks]]. */
#define _GNU_SOURCE
#include <math.h>
#include <prism.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { EDGE = 40, BYTES = EDGE * EDGE * EDGE * 2 };
static int failures = 0;
#define TRUE(condition)                                                                            \
    do {                                                                                           \
        if (!(condition))                                                                          \
            fprintf(stderr, "line %d: not %s: '%s'\n", __LINE__, #condition, prism_last_error()),  \
                failures++;                                                                        \
    } while (0)

static prism_model *model;
static double middle[3] = {20, 20, 20};

/* Noise in pages of its own. */
static int16_t *mapped(int edge) {
    int all = edge * edge * edge;
    int16_t *voxels = mmap(NULL, all * sizeof *voxels, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (int i = 0; i < all; i++) voxels[i] = (int16_t)(i * 7919 % 400 - 200);
    return voxels;
}

static prism_volume *wrapped(int16_t *voxels, size_t edge) {
    prism_array array = {0};
    prism_volume *volume = NULL;
    array.struct_size = sizeof array;
    array.data = voxels;
    array.element = PRISM_INT16;
    array.size[0] = array.size[1] = array.size[2] = edge;
    TRUE(prism_volume_wrap(&array, &volume) == PRISM_OK);
    return volume;
}

static prism_prompts prompts(void) {
    prism_prompts p = {0};
    p.struct_size = sizeof p;
    p.points = middle;
    p.point_count = 1;
    return p;
}

/* Waits until another thread has set a flag. What never comes would otherwise hang the test. */
static void await(_Atomic int *flag, const char *name) {
    for (int tries = 0; !*flag; tries++) {
        if (tries == 6000000) {
            fprintf(stderr, "'%s' was not set within ten minutes\n", name);
            _exit(1);
        }
        usleep(100);
    }
}

static _Atomic int begun;

static int on_progress(void *user, double done, const char *stage) {
    (void)done, (void)stage;
    begun = 1;
    if (user) {
        /* A callback cannot wait for the call that it is part of. */
        TRUE(prism_session_free(user) == PRISM_BUSY);
    }
    return 1;
}

static void *interacts(void *session) {
    prism_prompts p = prompts();
    prism_status got;
    /* Until it is freed. */
    do got = prism_session_interact(session, &p, NULL), prism_session_reset(session);
    while (got == PRISM_OK || got == PRISM_BUSY || got == PRISM_CANCELLED);
    TRUE(got == PRISM_INVALID_HANDLE);
    return NULL;
}

/* Frees everything while another thread interacts, then unmaps the array that was wrapped. */
static void frees(int cancels) {
    int16_t *voxels = mapped(EDGE);
    prism_volume *volume = wrapped(voxels, EDGE);
    prism_session *session = NULL;
    TRUE(prism_session_open(model, volume, NULL, &session) == PRISM_OK);
    TRUE(prism_session_set_progress(session, on_progress, NULL) == PRISM_OK);
    pthread_t worker;
    begun = 0;
    pthread_create(&worker, NULL, interacts, session);
    await(&begun, "begun");
    TRUE(prism_volume_free(volume) == PRISM_OK);
    if (cancels) TRUE(prism_session_cancel(session) == PRISM_OK);
    TRUE(prism_session_free(session) == PRISM_OK);
    munmap(voxels, BYTES);
    pthread_join(worker, NULL);
}

static void *opens(void *volume) {
    prism_session *session = NULL;
    prism_status got;
    do {
        begun = 1;
        got = prism_session_open(model, volume, NULL, &session);
        if (got == PRISM_OK) prism_session_free(session);
    } while (got == PRISM_OK);
    TRUE(got == PRISM_INVALID_HANDLE);
    return NULL;
}

/* Frees a volume that another thread opens sessions on, which read its voxels, then unmaps them. */
static void frees_volume(void) {
    enum { LARGE = 160, MANY = LARGE * LARGE * LARGE };
    int16_t *voxels = mapped(LARGE);
    prism_volume *volume = wrapped(voxels, LARGE);
    pthread_t worker;
    begun = 0;
    pthread_create(&worker, NULL, opens, volume);
    await(&begun, "begun");
    usleep(3000);
    TRUE(prism_volume_free(volume) == PRISM_OK);
    /* A session that was open already reads nothing by itself: the thread that opened it frees it,
     * and opens no other. */
    mprotect(voxels, MANY * 2, PROT_NONE);
    pthread_join(worker, NULL);
    munmap(voxels, MANY * 2);
}

/* Has the library say something. */
static void talk(void) {
    static const float odd[8] = {NAN, 1, 2, 3, 4, 5, 6, 7};
    prism_array array = {0};
    prism_volume *volume = NULL;
    array.struct_size = sizeof array;
    array.data = odd;
    array.element = PRISM_FLOAT32;
    array.size[0] = array.size[1] = array.size[2] = 2;
    TRUE(prism_volume_wrap(&array, &volume) == PRISM_OK && prism_volume_free(volume) == PRISM_OK);
}

static void *talks(void *unused) {
    (void)unused;
    talk();
    return NULL;
}

static _Atomic int within, leaves;

static void listens(void *lent, const char *message) {
    static _Atomic int told;
    (void)message;
    if (within) {
        /* By itself, from the loop below. */
        told = 1;
        return;
    }
    within = 1;
    /* Until the callback is called no more: it is replaced, and the thread that did that waits for
     * its end. */
    int tries = 0;
    do {
        told = 0;
        usleep(100);
        talk();
    } while (told && ++tries < 6000000);
    if (told) fprintf(stderr, "the callback was not replaced within ten minutes\n"), _exit(1);
    usleep(3000);
    TRUE(*(int *)lent == 77);
}

/* Replaces a callback while another thread is within it, and takes away at once what was lent to
 * it. */
static void replaces(void) {
    int *lent = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    *lent = 77;
    pthread_t worker;
    within = 0;
    TRUE(prism_set_log(listens, lent) == PRISM_OK);
    pthread_create(&worker, NULL, talks, NULL);
    await(&within, "within");
    TRUE(prism_set_log(NULL, NULL) == PRISM_OK);
    munmap(lent, 4096);
    pthread_join(worker, NULL);
}

static void waits(void *user, const char *message) {
    (void)user, (void)message;
    if (within) {
        TRUE(prism_set_log(NULL, NULL) == PRISM_BUSY);
        leaves = 1;
    }
    within = 1;
    await(&leaves, "leaves");
}

static void ends(void *told, const char *message) {
    (void)message;
    (*(int *)told)++;
    TRUE(prism_set_log(NULL, NULL) == PRISM_OK);
}

/* A callback does not wait for itself, nor for another thread's. */
static void replaces_itself(void) {
    int told = 0;
    pthread_t worker;
    within = leaves = 0;
    TRUE(prism_set_log(waits, NULL) == PRISM_OK);
    pthread_create(&worker, NULL, talks, NULL);
    await(&within, "within");
    talk();
    pthread_join(worker, NULL);
    TRUE(leaves && prism_set_log(ends, &told) == PRISM_OK);
    talk(), talk();
    TRUE(told == 1);
}

static void forks(void) {
    int16_t *voxels = calloc(1, BYTES);
    voxels[0] = 1;
    prism_volume *volume = wrapped(voxels, EDGE);
    prism_session *session = NULL;
    TRUE(prism_session_open(model, volume, NULL, &session) == PRISM_OK);
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        alarm(300);
        prism_prompts p = prompts();
        int right = prism_session_interact(session, &p, NULL) == PRISM_FORKED &&
                    strstr(prism_last_error(), "fork") &&
                    prism_session_free(session) == PRISM_FORKED &&
                    prism_abi_version() == PRISM_ABI_VERSION;
        _exit(right ? 0 : 1);
    }
    int status = 0;
    waitpid(child, &status, 0);
    TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    prism_prompts p = prompts();
    TRUE(prism_session_interact(session, &p, NULL) == PRISM_OK);
    TRUE(prism_session_free(session) == PRISM_OK && prism_volume_free(volume) == PRISM_OK);
    free(voxels);
}

/* The undo history stays within its limits, and what is left of it works. */
static void remembers(void) {
    int16_t *voxels = calloc(1, BYTES);
    voxels[0] = 1;
    prism_volume *volume = wrapped(voxels, EDGE);
    prism_session *session = NULL;
    prism_session_options options = {0};
    options.struct_size = sizeof options;
    options.undo_steps = 3;
    TRUE(prism_session_open(model, volume, &options, &session) == PRISM_OK);
    prism_prompts p = prompts();
    TRUE(prism_session_set_progress(session, on_progress, session) == PRISM_OK);
    for (int i = 0; i < 5; i++) {
        double point[3] = {(double)(5 + 6 * i), 20, 20};
        p.points = point;
        TRUE(prism_session_interact(session, &p, NULL) == PRISM_OK);
    }
    int undone = 0;
    while (prism_session_undo(session) == PRISM_OK) undone++;
    TRUE(undone == 3);
    TRUE(prism_session_reset(session) == PRISM_OK);
    TRUE(prism_session_undo(session) == PRISM_NOTHING);
    TRUE(prism_session_free(session) == PRISM_OK && prism_volume_free(volume) == PRISM_OK);
    free(voxels);
}

int main(int count, char **arguments) {
    prism_engine *engine = NULL;
    prism_engine_options options = {0};
    options.struct_size = sizeof options;
    options.threads = 2;
    if (count < 2 || prism_engine_open("cpu", &options, &engine) != PRISM_OK ||
        prism_model_load(engine, arguments[1], &model) != PRISM_OK) {
        fprintf(stderr, "%s\n", prism_last_error());
        return 1;
    }
    int times = count > 2 ? atoi(arguments[2]) : 40;
    for (int i = 0; i < times; i++) frees(i % 2);
    for (int i = 0; i < times / 2; i++) frees_volume();
    for (int i = 0; i < times; i++) replaces();
    replaces_itself();
    /* Valgrind's exit status of a fork tells of what its parent has still to free. */
    if (count < 4) forks();
    remembers();
    TRUE(prism_model_free(model) == PRISM_OK && prism_engine_free(engine) == PRISM_OK);
    printf("lifetimes hold\n");
    return failures > 0;
}
