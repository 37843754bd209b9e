/* Refuses memory to every function of the interface:
 * memory MODEL IMAGE FOLDER STEP [PART...], all parts (below) or those that are named.
 *
 * In each part every STEPth allocation of 48 KiB or more (from the first on in the first part, from
 * the second on in the next) is refused in turn, then all from it on until a call says so; then the
 * library has a budget, larger and larger. A refusal is PRISM_OUT_OF_MEMORY from the call that met
 * it and changes nothing: that call is made again at once, all that follows is done, and every run
 * must give what one without refusals gives. After it no more is held than before. Smaller
 * allocations are not refused: Rust ends a process to which the system refuses those. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <malloc.h>
#include <prism.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static size_t smallest = 49152;

/* What is refused: nothing, one allocation, all from one on, or what is beyond a budget. */
enum { NOTHING, ONE, ALL, BUDGET };
static int refusing = NOTHING;
static long asked, refuse_at;

/* Bytes of blocks of `smallest` and more that are held. */
static long held;

/* Whether this allocation is refused. */
static int refused(size_t bytes) {
    if (bytes < smallest) return 0;
    long n = __atomic_fetch_add(&asked, 1, __ATOMIC_SEQ_CST);
    int no = (refusing == ONE && n == refuse_at) || (refusing == ALL && n >= refuse_at);
    if (no && getenv("MEMORY_STOP")) abort();
    if (no) errno = ENOMEM;
    return no;
}

static void count(long bytes) {
    if ((size_t)labs(bytes) >= smallest) __atomic_fetch_add(&held, bytes, __ATOMIC_SEQ_CST);
}

/* Whether blocks are counted: from main on. Before it AddressSanitizer has some that it does not
 * know the size of. */
static int counts;

static long size(void *block) { return counts && block ? (long)malloc_usable_size(block) : 0; }

/* A block, counted. */
static void *given(void *block) {
    count(size(block));
    return block;
}

/* The next function of this name after this program's: the system's, or valgrind's. */
#define BEHIND(name)                                                                               \
    static __typeof__(&name) next;                                                                 \
    if (!next) *(void **)&next = dlsym(RTLD_NEXT, #name)

/* AddressSanitizer's by the names of its own: it asks for memory while it begins, when none can be
 * looked up. It has none for munmap. */
#ifdef __SANITIZE_ADDRESS__
#define NEXT(name)                                                                                 \
    extern __typeof__(name) __interceptor_##name;                                                  \
    __typeof__(&name) next = __interceptor_##name
#else
#define NEXT BEHIND
#endif

void *malloc(size_t n) {
    NEXT(malloc);
    return refused(n) ? NULL : given(next(n));
}
void *calloc(size_t a, size_t b) {
    NEXT(calloc);
    return refused(a * b) ? NULL : given(next(a, b));
}
void *realloc(void *block, size_t n) {
    NEXT(realloc);
    if (refused(n)) return NULL;
    long before = size(block);
    void *moved = next(block, n);
    if (moved || !n) count(-before);
    return given(moved);
}
void *aligned_alloc(size_t a, size_t n) {
    NEXT(aligned_alloc);
    return refused(n) ? NULL : given(next(a, n));
}
int posix_memalign(void **block, size_t a, size_t n) {
    NEXT(posix_memalign);
    int got = refused(n) ? ENOMEM : next(block, a, n);
    if (!got) given(*block);
    return got;
}
void free(void *block) {
    NEXT(free);
    count(-size(block));
    next(block);
}
/* Rust requests maps by either name. */
void *mmap64(void *at, size_t n, int how, int flags, int file, off64_t offset) {
    NEXT(mmap64);
    if ((flags & MAP_ANONYMOUS) && refused(n)) return MAP_FAILED;
    void *map = next(at, n, how, flags, file, offset);
    if (map != MAP_FAILED) count((long)n);
    return map;
}
void *mmap(void *at, size_t n, int how, int flags, int file, off_t offset) {
    return mmap64(at, n, how, flags, file, offset);
}
int munmap(void *at, size_t n) {
    BEHIND(munmap);
    int got = next(at, n);
    if (!got) count(-(long)n);
    return got;
}

/* How this run refuses: its kind, from which allocation on, or within how many bytes. */
static int kind;
static long number;
static size_t budget;

static prism_engine_options one_thread(void) {
    prism_engine_options options = {0};
    options.struct_size = sizeof options, options.threads = 1;
    return options;
}

/* Gives the library a budget, which an engine sets for the process. */
static void limit(size_t bytes) {
    prism_engine *engine = NULL;
    prism_engine_options options = one_thread();
    options.memory = bytes;
    if (prism_engine_open("cpu", &options, &engine) != PRISM_OK ||
        prism_engine_free(engine) != PRISM_OK)
        abort();
}

/* From here on memory may be refused. */
static void begins(void) {
    if (kind == BUDGET) limit(budget);
    asked = 0, refuse_at = number, refusing = kind;
}

/* From here on memory is not refused. */
static void ends(void) {
    int had_budget = refusing == BUDGET;
    refusing = NOTHING;
    if (had_budget) limit(SIZE_MAX);
}

static int failures, met;

/* Reports a failure. */
static int wrong(const char *what, const char *how) {
    static const char *const kinds[] = {"nothing", "one", "all", "by budget"};
    fprintf(stderr, "refusing %s, %ld, %zu: %s %s: '%s'\n", kinds[kind], number, budget, what, how,
            prism_last_error());
    failures++;
    return 0;
}

/* Whether the call succeeded; if it was refused memory, nothing more is refused. */
static int done(prism_status got, const char *what) {
    if (got == PRISM_OK) return 1;
    if (refusing == NOTHING || got != PRISM_OUT_OF_MEMORY ||
        !strstr(prism_last_error(), "out of memory"))
        wrong(what, prism_status_name(got));
    met++;
    ends();
    return 0;
}

/* Whether the call succeeded, at once or when it was made again. */
#define DONE(call) (done((call), #call) || done((call), #call))
/* The same for a call that stores a handle at `place`, which is NULL before. */
#define MADE(place, call)                                                                          \
    (done((call), #call) || ((place) != NULL && wrong(#call, "left a handle")) ||                  \
     done((call), #call))

static const char *model_path, *image, *folder;
static void *model_bytes;
static size_t model_size;

/* The handles of a run. */
static struct {
    prism_engine *engine;
    prism_model *model, *second;
    prism_volume *volume, *wrapped;
    prism_session *session, *other;
    prism_prediction *answer;
} t;

/* A hash of all that a run has read. */
static uint64_t sum;

static void mix(const void *data, size_t n) {
    const uint8_t *bytes = data;
    for (size_t i = 0; i < n; i++) sum = (sum ^ bytes[i]) * 1099511628211u;
}

/* What is read goes here. */
static uint8_t bytes[1 << 22];
static float *const floats = (float *)(void *)bytes;

/* What a session has: how far it can be undone and redone, and its answer. No allocation is refused
 * meanwhile; a budget stays, of which reading takes nothing. */
static uint64_t standing(const prism_session *session) {
    int refused_before = refusing;
    long asked_before = asked;
    uint64_t sum_before = sum;
    refusing = NOTHING, sum = 0;
    size_t depth[2] = {0}, n = 0;
    prism_prediction *answer = NULL;
    if (prism_session_get_depth(session, depth, depth + 1) != PRISM_OK)
        wrong("the session", "has no depth");
    prism_status got = prism_session_get_prediction(session, &answer);
    if (got == PRISM_OK)
        got = prism_prediction_get_logits(answer, PRISM_GRID_VOLUME, floats, sizeof bytes, NULL,
                                          &n);
    if (got != PRISM_OK && got != PRISM_NOTHING)
        wrong("the session's answer", prism_status_name(got));
    mix(depth, sizeof depth), mix(bytes, n);
    prism_prediction_free(answer);
    uint64_t found = sum;
    refusing = refused_before, asked = asked_before, sum = sum_before;
    return found;
}

/* A call that changes the session, all of it or nothing; one that failed leaves no answer either,
 * of which there is none before. */
static uint64_t stood;
#define CHANGES(call)                                                                              \
    (stood = standing(t.session),                                                                  \
     done((call), #call) ||                                                                        \
         (standing(t.session) != stood && wrong(#call, "changed the session")) ||                  \
         (t.answer != NULL && wrong(#call, "left a handle")) || done((call), #call))

/* All that can be read of the answer, which is given back. */
static int reads(void) {
    const prism_prediction *p = t.answer;
    prism_prediction_info info = {0};
    info.struct_size = sizeof info;
    size_t n = 0;
    if (!DONE(prism_prediction_get_info(p, &info))) return 0;
    size_t counts[] = {info.candidates, info.selected, info.left_out,
                       info.thinned,    info.looks,    info.changed};
    mix(counts, sizeof counts);
    for (int32_t grid = PRISM_GRID_VOLUME; grid <= PRISM_GRID_PATCH; grid++) {
        if (!DONE(prism_prediction_get_mask(p, grid, bytes, sizeof bytes, NULL, &n))) return 0;
        mix(bytes, n);
        if (!DONE(prism_prediction_get_logits(p, grid, floats, sizeof bytes, NULL, &n))) return 0;
        mix(bytes, n);
    }
    for (size_t c = 0; c < info.candidates; c++) {
        if (!DONE(prism_prediction_get_candidate(p, c, bytes, sizeof bytes, NULL, &n))) return 0;
        mix(bytes, n);
    }
    if (!DONE(prism_prediction_get_scores(p, floats, sizeof bytes / sizeof *floats, &n))) return 0;
    mix(bytes, n * sizeof *floats);
    if (prism_prediction_free(t.answer) != PRISM_OK) return wrong("an answer", "is not given back");
    t.answer = NULL;
    return 1;
}

/* An interaction, and its answer. */
static int says(const prism_prompts *prompts) {
    return CHANGES(prism_session_interact(t.session, prompts, &t.answer)) && reads();
}

/* The answer's mask as a file, whole or not at all. */
static int saves(const char *name) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    remove(path);
    if (!done(prism_prediction_save_mask(t.answer, path), name)) {
        if (access(path, F_OK) == 0) wrong(name, "was left");
        if (!done(prism_prediction_save_mask(t.answer, path), name)) return 0;
    }
    FILE *file = fopen(path, "rb");
    if (!file) return wrong(name, "is not there");
    size_t n = fread(bytes, 1, sizeof bytes, file);
    fclose(file);
    /* A DICOM object has a number of its own each time. */
    if (!strstr(name, ".dcm")) mix(bytes, n);
    return 1;
}

static prism_prompts nothing_said(void) {
    prism_prompts p = {0};
    p.struct_size = sizeof p;
    return p;
}

static void heard(void *user, const char *message) { (void)user, (void)message; }

static int32_t goes_on(void *user, double share, const char *stage) {
    (void)user, (void)share, (void)stage;
    return 1;
}

/* A scan of the caller's, so small that the network sees all of it at once: what is said of it is
 * looked at once, not followed. */
enum { EDGE = 40, VOXELS = EDGE * EDGE * EDGE };
static float values[VOXELS];

static prism_array array(void) {
    static const double spacing[3] = {0.7, 0.7, 0.7};
    prism_array a = {0};
    a.spacing = spacing;
    a.struct_size = sizeof a;
    a.data = values;
    a.element = PRISM_FLOAT32;
    a.size[0] = a.size[1] = a.size[2] = EDGE;
    return a;
}

/* A box with a click in it, on the image or in the middle of the caller's scan. */
static prism_prompts boxed(int on_image) {
    static const double points[2][3] = {{20, 20, 20}, {10, 8, 7}},
                        bounds[2][6] = {{14, 14, 14, 26, 26, 26}, {5, 4, 3, 16, 13, 12}};
    prism_prompts p = nothing_said();
    p.points = points[on_image], p.point_count = 1, p.bounds = bounds[on_image];
    return p;
}

/* Sessions that have encoded their scans, each opened once: on the caller's scan, there the network
 * alone, on the image. */
enum { STEERED, RELEASED, ON_IMAGE };
static struct {
    prism_engine *engine;
    prism_model *model;
    prism_volume *volumes[2];
    prism_session *sessions[3];
} kept;

/* Their model. */
static int model_kept(void) {
    prism_engine_options options = one_thread();
    return kept.model || (DONE(prism_engine_open("cpu", &options, &kept.engine)) &&
                          DONE(prism_model_load(kept.engine, model_path, &kept.model)));
}

/* An object on one of these scans, before anything is refused. */
static int forked(int which) {
    prism_volume **volume = &kept.volumes[which == ON_IMAGE];
    prism_session **session = &kept.sessions[which];
    prism_session_options how = {0};
    how.struct_size = sizeof how, how.released = which == RELEASED;
    prism_array scan = array();
    prism_prompts first = boxed(which == ON_IMAGE);
    if (!model_kept()) return 0;
    if (!*volume && !(which == ON_IMAGE ? DONE(prism_volume_read(image, -1, volume))
                                        : DONE(prism_volume_wrap(&scan, volume))))
        return 0;
    if (!*session && !(DONE(prism_session_open(kept.model, *volume, &how, session)) &&
                       DONE(prism_session_encode(*session, &first))))
        return 0;
    return DONE(prism_session_fork(*session, &t.session));
}

/* The parts; each returns 1 if all was done. */

static int reading(void) {
    prism_volume_info info = {0};
    info.struct_size = sizeof info;
    begins();
    if (!MADE(t.volume, prism_volume_read(image, -1, &t.volume)) ||
        !DONE(prism_volume_get_info(t.volume, &info)))
        return 0;
    mix(&info, sizeof info);
    return 1;
}

static int opening(void) {
    prism_engine_options options = one_thread();
    prism_model_info info = {0};
    info.struct_size = sizeof info;
    char line[256];
    size_t n = 0;
    begins();
    return MADE(t.engine, prism_engine_open("cpu", &options, &t.engine)) &&
           DONE(prism_engine_describe(t.engine, line, sizeof line, &n)) &&
           MADE(t.model, prism_model_load(t.engine, model_path, &t.model)) &&
           DONE(prism_model_get_info(t.model, &info)) &&
           MADE(t.second, prism_model_load_memory(t.engine, model_bytes, model_size, &t.second)) &&
           DONE(prism_model_warm_up(t.second));
}

static int scanning(void) {
    prism_volume_info info = {0};
    info.struct_size = sizeof info;
    prism_array scan = array();
    if (!model_kept() || !DONE(prism_volume_read(image, -1, &t.volume))) return 0;
    begins();
    if (!DONE(prism_set_log(heard, NULL)) ||
        !MADE(t.wrapped, prism_volume_wrap(&scan, &t.wrapped)) ||
        !DONE(prism_volume_get_info(t.wrapped, &info)))
        return 0;
    mix(&info, sizeof info);
    for (int32_t intensity = PRISM_INTENSITY_AUTO; intensity <= PRISM_INTENSITY_PET; intensity++) {
        prism_session_options how = {0};
        how.struct_size = sizeof how, how.intensity = intensity;
        how.clip[0] = -200, how.clip[1] = 200, how.mean = 0, how.sd = 100;
        if (!MADE(t.session, prism_session_open(kept.model, t.wrapped, &how, &t.session)) ||
            !MADE(t.other, prism_session_open(kept.model, t.volume, &how, &t.other)))
            return 0;
        if (prism_session_free(t.session) != PRISM_OK || prism_session_free(t.other) != PRISM_OK)
            return wrong("a session", "is not given back");
        t.session = t.other = NULL;
    }
    return DONE(prism_set_log(NULL, NULL));
}

static int clicking(void) {
    double off[3] = {2, 2, 2};
    uint8_t minus = 0;
    prism_prompts first = boxed(1), correction = nothing_said();
    correction.points = off, correction.point_labels = &minus, correction.point_count = 1;
    prism_patch_info patch = {0};
    patch.struct_size = sizeof patch;
    size_t undo = 0, redo = 0;
    /* On an engine that has done nothing yet. */
    prism_engine_options options = one_thread();
    if (!(DONE(prism_engine_open("cpu", &options, &t.engine)) &&
          DONE(prism_model_load(t.engine, model_path, &t.model)) &&
          DONE(prism_volume_read(image, -1, &t.volume)) &&
          DONE(prism_session_open(t.model, t.volume, NULL, &t.session))))
        return 0;
    begins();
    if (!(DONE(prism_session_set_progress(t.session, goes_on, NULL)) &&
          CHANGES(prism_session_encode(t.session, &first)) && says(&first) && says(&correction) &&
          CHANGES(prism_session_undo(t.session)) && CHANGES(prism_session_redo(t.session)) &&
          DONE(prism_session_get_depth(t.session, &undo, &redo)) &&
          DONE(prism_session_get_patch(t.session, &patch)) &&
          MADE(t.answer, prism_session_get_prediction(t.session, &t.answer)) && reads()))
        return 0;
    mix(&patch.edge, sizeof patch.edge), mix(&patch.spacing, sizeof patch.spacing),
        mix(patch.affine, sizeof patch.affine);
    return undo == 2 && redo == 0;
}

/* Another object on the same scan; then the first anew. */
static int sharing(void) {
    prism_prompts first = boxed(1);
    if (!forked(ON_IMAGE) || !says(&first)) return 0;
    begins();
    return MADE(t.other, prism_session_fork(t.session, &t.other)) &&
           DONE(prism_session_cancel(t.other)) &&
           MADE(t.answer, prism_session_interact(t.other, &first, &t.answer)) && reads() &&
           CHANGES(prism_session_reset(t.session)) && says(&first);
}

static int saving(void) {
    static const char *const names[] = {"mask.nii.gz", "mask.nii", "mask.nrrd", "mask.seg.nrrd",
                                        "mask.mha",    "mask.mhd", "mask.dcm"};
    prism_prompts first = boxed(1);
    struct stat of_image;
    size_t formats = stat(image, &of_image) == 0 && S_ISDIR(of_image.st_mode) ? 7 : 6;
    if (!forked(ON_IMAGE) || !DONE(prism_session_interact(t.session, &first, &t.answer))) return 0;
    begins();
    for (size_t n = 0; n < formats; n++)
        if (!saves(names[n])) return 0;
    return 1;
}

/* Something is said to a session that has an answer already. */
static int prompted(int which, const prism_prompts *prompts) {
    prism_prompts first = boxed(0);
    if (!forked(which) || !says(&first)) return 0;
    begins();
    return says(prompts);
}

static uint8_t marks[VOXELS];

enum { MANY = 3500 };
static int32_t scribble[3 * MANY];

static prism_prompts scribbled(void) {
    prism_prompts p = nothing_said();
    p.scribble = scribble, p.scribble_count = MANY;
    return p;
}

static int drawing(void) {
    double lines[12] = {12, 20, 20, 28, 20, 20, 20, 12, 20, 20, 28, 20},
           lasso[12] = {10, 10, 21, 30, 10, 21, 30, 30, 21, 10, 30, 21};
    prism_prompts p = nothing_said();
    p.lines = lines, p.line_count = 2, p.lasso = lasso, p.lasso_count = 4;
    return prompted(STEERED, &p);
}

static int scribbling(void) {
    prism_prompts p = scribbled();
    return prompted(STEERED, &p);
}

/* A mask, or logits, with a click that says otherwise. */
static int masking(void) {
    double point[3] = {2, 20, 20};
    uint8_t minus = 0;
    prism_prompts p = nothing_said();
    p.points = point, p.point_labels = &minus, p.point_count = 1, p.dense = marks,
        p.dense_kind = PRISM_DENSE_MASK;
    return prompted(STEERED, &p);
}

static int going_on(void) {
    double point[3] = {20, 20, 35};
    prism_prompts p = nothing_said();
    p.points = point, p.point_count = 1, p.others = marks, p.dense = values,
        p.dense_kind = PRISM_DENSE_LOGITS;
    return prompted(STEERED, &p);
}

/* All at once, to the network alone. */
static int asking_the_network(void) {
    prism_prompts p = scribbled();
    p.others = marks, p.dense = marks, p.dense_kind = PRISM_DENSE_MASK;
    return prompted(RELEASED, &p);
}

#define PART(name) {#name, name}
static const struct {
    const char *name;
    int (*run)(void);
} parts[] = {PART(reading), PART(opening),  PART(scanning),          PART(clicking),
             PART(sharing), PART(saving),   PART(drawing),           PART(scribbling),
             PART(masking), PART(going_on), PART(asking_the_network)};

/* Checks that handles were given back; giving back NULL is no error. */
static void give_back(const prism_status *given, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (given[i] != PRISM_OK) wrong("giving back", prism_status_name(given[i]));
}

/* Runs a part once; its hash, 0 if it was not done. */
static uint64_t once(int (*part)(void)) {
    sum = 1469598103934665603u;
    int is_done = part();
    /* Giving back takes no memory. */
    prism_status given[] = {prism_prediction_free(t.answer), prism_session_free(t.session),
                            prism_session_free(t.other),     prism_volume_free(t.volume),
                            prism_volume_free(t.wrapped),    prism_model_free(t.model),
                            prism_model_free(t.second),      prism_engine_free(t.engine)};
    give_back(given, sizeof given / sizeof *given);
    memset(&t, 0, sizeof t);
    ends();
    return is_done ? sum : 0;
}

/* Runs a part with every `step`th refusal from the `first` on; returns their number. */
static long refused_in_turn(const char *name, int (*part)(void), long first, long step) {
    /* What the library makes only once it makes here. */
    kind = NOTHING;
    once(part);
    long before = held;
    uint64_t expected = once(part);
    long each = asked, refusals = 0;
    if (!expected || each < 1) wrong(name, "was not done, or asks for nothing");
    for (kind = ONE; kind <= ALL; kind++)
        for (number = first % each; number < each; number += step, refusals++)
            if (once(part) != expected) wrong(name, "came to something else");
    /* Budgets, until nothing is beyond one. */
    kind = BUDGET, number = 0;
    int met_before = -1;
    for (budget = (size_t)1 << 18; met != met_before; budget += budget / 2 * (size_t)step) {
        met_before = met;
        if (once(part) != expected) wrong(name, "came to something else");
    }
    kind = NOTHING;
    /* Threads give back their memory when they end, for which no call waits. A block that is kept
     * for later, such as an encoded patch, may be a few bytes larger than the one it replaced. */
    long slack = (long)smallest - 1;
    for (int tenths = 0; held - before > slack && tenths < 6000; tenths++) usleep(100000);
    if (held - before > slack)
        fprintf(stderr, "%s: %ld bytes were not given back\n", name, held - before), failures++;
    if (getenv("MEMORY_SAY"))
        fprintf(stderr, "%s: %ld allocations; %zu bytes were enough\n", name, each, budget);
    return refusals;
}

int main(int argc, char **argv) {
    counts = 1;
    if (argc < 5 || atol(argv[4]) < 1 || prism_abi_version() != PRISM_ABI_VERSION ||
        !*prism_version())
        return 2;
    model_path = argv[1], image = argv[2], folder = argv[3];
    if (getenv("MEMORY_SMALLEST")) smallest = strtoul(getenv("MEMORY_SMALLEST"), NULL, 10);
    FILE *file = fopen(model_path, "rb");
    if (!file || fseek(file, 0, SEEK_END) != 0) return 2;
    model_size = (size_t)ftell(file);
    rewind(file);
    model_bytes = malloc(model_size);
    if (!model_bytes || fread(model_bytes, 1, model_size, file) != model_size) return 2;
    fclose(file);
    for (int n = 0; n < VOXELS; n++) {
        int x = n % EDGE - 20, y = n / EDGE % EDGE - 20, z = n / EDGE / EDGE - 20;
        values[n] = (float)((x * x + y * y + z * z < 49 ? 80 : -20) + n * 7919 % 21);
        marks[n] = n % EDGE < 5;
    }
    for (int n = 0; n < MANY; n++)
        scribble[3 * n] = 10 + n % 20, scribble[3 * n + 1] = 10 + n / 20 % 20,
            scribble[3 * n + 2] = 16 + n / 400;
    long refusals = 0, step = atol(argv[4]);
    for (size_t p = 0; p < sizeof parts / sizeof *parts; p++) {
        int wanted = argc == 5;
        for (int a = 5; a < argc; a++) wanted |= strcmp(argv[a], parts[p].name) == 0;
        if (wanted) refusals += refused_in_turn(parts[p].name, parts[p].run, (long)p % step, step);
    }
    prism_status given[] = {
        prism_session_free(kept.sessions[0]), prism_session_free(kept.sessions[1]),
        prism_session_free(kept.sessions[2]), prism_volume_free(kept.volumes[0]),
        prism_volume_free(kept.volumes[1]),   prism_model_free(kept.model),
        prism_engine_free(kept.engine)};
    give_back(given, sizeof given / sizeof *given);
    free(model_bytes);
    printf("%ld allocations refused in turn, %d calls told so, %d failures\n", refusals, met,
           failures);
    return failures > 0 || met == 0;
}
