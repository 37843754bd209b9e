/* Refuses each allocation of 48 KiB or more in turn, then all from there on, while a scan is read, segmented and written: memory MODEL IMAGE FOLDER [FIRST [STEP]], with "read" for
 * MODEL the scan is only read. A refusal is PRISM_OUT_OF_MEMORY from
 * the call that met it, and afterwards everything works as if nothing had been. Smaller allocations are not refused: Rust ends a process that the system has not even those for. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <prism.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static size_t smallest = 49152;

static long asked, refuse_at = -1;
static int all_from_there;

/* Whether this allocation is refused. */
static int refused(size_t bytes) {
    if (bytes < smallest) return 0;
    long n = __atomic_fetch_add(&asked, 1, __ATOMIC_SEQ_CST);
    int no = refuse_at >= 0 && (all_from_there ? n >= refuse_at : n == refuse_at);
    if (no && getenv("MEMORY_STOP")) abort();
    if (no) errno = ENOMEM;
    return no;
}

extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t), *__libc_memalign(size_t, size_t);

void *malloc(size_t n) { return refused(n) ? NULL : __libc_malloc(n); }
void *calloc(size_t a, size_t b) { return refused(a * b) ? NULL : __libc_calloc(a, b); }
void *realloc(void *p, size_t n) { return refused(n) ? NULL : __libc_realloc(p, n); }
void *aligned_alloc(size_t a, size_t n) { return refused(n) ? NULL : __libc_memalign(a, n); }
int posix_memalign(void **p, size_t a, size_t n) {
    if (refused(n)) return ENOMEM;
    *p = __libc_memalign(a, n);
    return *p ? 0 : ENOMEM;
}
void *mmap(void *at, size_t n, int how, int flags, int file, off_t offset) {
    static void *(*next)(void *, size_t, int, int, int, off_t);
    if (!next) *(void **)&next = dlsym(RTLD_NEXT, "mmap");
    if ((flags & MAP_ANONYMOUS) && refused(n)) return MAP_FAILED;
    return next(at, n, how, flags, file, offset);
}

static int failures, met;

/* The call is done, or was refused memory. */
static int done(prism_status got, const char *what) {
    if (got == PRISM_OK) return 1;
    if (refuse_at < 0 || got != PRISM_OUT_OF_MEMORY || !strstr(prism_last_error(), "out of memory")) {
        fprintf(stderr, "refusing %ld: %s gave %s, '%s'\n", refuse_at, what, prism_status_name(got), prism_last_error());
        failures++;
    }
    met++;
    return 0;
}
#define DONE(call) done((call), #call)

static uint64_t hash(const uint8_t *mask, size_t n) {
    uint64_t h = 1469598103934665603u;
    for (size_t i = 0; i < n; i++) h = (h ^ mask[i]) * 1099511628211u;
    return h;
}

/* A file once; 1, or 0 where something was refused. */
static uint64_t reading(const char *image) {
    prism_volume *volume = NULL;
    int all = DONE(prism_volume_read(image, -1, &volume));
    if (prism_volume_free(volume) != PRISM_OK) failures++;
    return all ? 1 : 0;
}

/* Everything once; the hash of the masks, or 0 where something was refused. */
static uint64_t everything(const char *model_path, const char *image, const char *folder) {
    if (strcmp(model_path, "read") == 0) return reading(image);
    prism_engine *engine = NULL;
    prism_model *model = NULL;
    prism_volume *volume = NULL;
    prism_session *session = NULL;
    prism_prediction *first = NULL, *second = NULL;
    prism_engine_options options = {0};
    options.struct_size = sizeof options;
    options.threads = 1;
    double point[3] = {10, 8, 7}, bounds[6] = {5, 4, 3, 16, 13, 12}, off[3] = {2, 2, 2};
    prism_prompts prompts = {0}, correction = {0};
    prompts.struct_size = correction.struct_size = sizeof prompts;
    prompts.points = point;
    prompts.point_count = 1;
    prompts.bounds = bounds;
    uint8_t minus = 0;
    correction.points = off;
    correction.point_labels = &minus;
    correction.point_count = 1;
    static uint8_t mask[1 << 24];
    size_t n = 0, m = 0;
    char path[4096];
    snprintf(path, sizeof path, "%s/mask.nii.gz", folder);
    uint64_t answer = 0;
    int all = DONE(prism_engine_open("cpu", &options, &engine)) && DONE(prism_model_load(engine, model_path, &model)) && DONE(prism_volume_read(image, -1, &volume)) &&
              DONE(prism_session_open(model, volume, NULL, &session));
    if (all) {
        all = DONE(prism_session_interact(session, &prompts, &first));
        /* A refused interaction changes nothing: it can be asked for again, at once. */
        if (!all && !all_from_there) all = DONE(prism_session_interact(session, &prompts, &first));
        all = all && DONE(prism_session_interact(session, &correction, &second)) && DONE(prism_prediction_get_mask(first, PRISM_GRID_VOLUME, mask, sizeof mask, NULL, &n)) &&
              DONE(prism_prediction_get_mask(second, PRISM_GRID_VOLUME, mask + n, sizeof mask - n, NULL, &m)) && DONE(prism_session_undo(session)) &&
              DONE(prism_prediction_save_mask(second, path));
    }
    if (all) answer = hash(mask, n + m);
    /* Freeing takes no memory. */
    prism_status freed[] = {prism_prediction_free(first), prism_prediction_free(second), prism_session_free(session), prism_volume_free(volume), prism_model_free(model), prism_engine_free(engine)};
    for (size_t i = 0; i < sizeof freed / sizeof *freed; i++)
        if (freed[i] != PRISM_OK) fprintf(stderr, "freeing %zu: %s\n", i, prism_last_error()), failures++;
    return answer;
}

int main(int count, char **arguments) {
    if (count < 4) return 2;
    if (getenv("MEMORY_SMALLEST")) smallest = strtoul(getenv("MEMORY_SMALLEST"), NULL, 10);
    /* What is made once for the process is made before. */
    everything(arguments[1], arguments[2], arguments[3]);
    asked = 0;
    uint64_t expected = everything(arguments[1], arguments[2], arguments[3]);
    long all = asked;
    if (!expected || all < (strcmp(arguments[1], "read") == 0 ? 1 : 20)) return fprintf(stderr, "nothing to refuse: %ld allocations\n", all), 1;
    long from = count > 4 ? atol(arguments[4]) : 0, step = count > 5 ? atol(arguments[5]) : 1;
    for (all_from_there = 0; all_from_there < 2; all_from_there++) {
        for (long n = from; n < all; n += step) {
            asked = 0;
            refuse_at = n;
            if (getenv("MEMORY_SAY")) fprintf(stderr, "%d %ld\n", all_from_there, n);
            uint64_t answer = everything(arguments[1], arguments[2], arguments[3]);
            if (answer && answer != expected) fprintf(stderr, "refusing %ld: another answer\n", n), failures++;
        }
    }
    refuse_at = -1;
    if (everything(arguments[1], arguments[2], arguments[3]) != expected) fprintf(stderr, "afterwards: another answer\n"), failures++;
    printf("%ld allocations refused in turn, %d calls told so, %d failures\n", all, met, failures);
    return failures > 0 || met == 0;
}
