/* Calls the interface wrongly in every way that it must survive, and rightly enough to see that it
 * works: torture MODEL FOLDER. Run plainly, under valgrind and with AddressSanitizer. */
#define _POSIX_C_SOURCE 200809L
#include <math.h>
#include <prism.h>
#include <pthread.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int failures = 0;

/* The call gives this status and, unless it is done, a message with `part` in it. */
#define EXPECT(expected, part, call)                                                               \
    do {                                                                                           \
        prism_status got_ = (call);                                                                \
        if (got_ != (expected) || (got_ != PRISM_OK && !strstr(prism_last_error(), part))) {       \
            fprintf(stderr, "line %d: %s gave %s, '%s'\n", __LINE__, #call,                        \
                    prism_status_name(got_), prism_last_error());                                  \
            failures++;                                                                            \
        }                                                                                          \
    } while (0)
#define OK(call) EXPECT(PRISM_OK, "", call)
#define TRUE(condition)                                                                            \
    do {                                                                                           \
        if (!(condition)) fprintf(stderr, "line %d: not %s\n", __LINE__, #condition), failures++;  \
    } while (0)

enum { EDGE = 40 };
static int16_t voxels[EDGE * EDGE * EDGE];
static int messages = 0;

static void count_message(void *user, const char *message) {
    TRUE(user == &messages && strlen(message) > 0);
    messages++;
}

static prism_array array(void) {
    static const double affine[16] = {1, 0, 0, -20, 0, 1, 0, -20, 0, 0, 1, -20, 0, 0, 0, 1};
    prism_array a = {0};
    a.struct_size = sizeof a;
    a.data = voxels;
    a.element = PRISM_INT16;
    a.size[0] = a.size[1] = a.size[2] = EDGE;
    a.affine = affine;
    return a;
}

static void engines(const char *path, prism_engine **engine, prism_model **model) {
    prism_engine_options options = {0};
    options.struct_size = sizeof options, options.threads = 2;
    prism_engine *none = NULL;
    EXPECT(PRISM_INVALID_ARGUMENT, "device is NULL", prism_engine_open(NULL, NULL, &none));
    EXPECT(PRISM_INVALID_ARGUMENT, "engine is NULL", prism_engine_open("cpu", NULL, NULL));
    EXPECT(PRISM_DEVICE, "toaster", prism_engine_open("toaster", NULL, &none));
    EXPECT(PRISM_INVALID_ARGUMENT, "not UTF-8", prism_engine_open("cpu\xff", NULL, &none));
    options.struct_size = 3;
    EXPECT(PRISM_INVALID_ARGUMENT, "struct_size", prism_engine_open("cpu", &options, &none));
    options.struct_size = sizeof options;
    options.precision = 77;
    EXPECT(PRISM_INVALID_ARGUMENT, "77", prism_engine_open("cpu", &options, &none));
    options.precision = PRISM_F16;
    EXPECT(PRISM_DEVICE, "f16", prism_engine_open("cpu", &options, &none));
    options.precision = PRISM_F32;
    options.threads = 4000000000u;
    /* As many as there are processors. */
    OK(prism_engine_open("cpu", &options, &none));
    OK(prism_engine_free(none));
    none = NULL;
    options.threads = 2;
    /* A budget that nothing fits, then one that all does. */
    prism_model *large = NULL;
    options.memory = 1000;
    OK(prism_engine_open("cpu", &options, engine));
    EXPECT(PRISM_OUT_OF_MEMORY, "out of memory", prism_model_load(*engine, path, &large));
    TRUE(large == NULL);
    OK(prism_engine_free(*engine));
    options.memory = (size_t)1 << 40;
    OK(prism_engine_open("cpu", &options, engine));

    char text[256];
    size_t needed = 0;
    OK(prism_engine_describe(*engine, NULL, 0, &needed));
    TRUE(needed > 10 && needed < sizeof text);
    memset(text, 'x', sizeof text);
    EXPECT(PRISM_BUFFER_TOO_SMALL, "holds 4 bytes", prism_engine_describe(*engine, text, 4, NULL));
    TRUE(text[0] == 'x');
    OK(prism_engine_describe(*engine, text, needed, NULL));
    TRUE(strlen(text) + 1 == needed && text[needed] == 'x');
    EXPECT(PRISM_INVALID_ARGUMENT, "both NULL", prism_engine_describe(*engine, NULL, 0, NULL));

    prism_model *bad = NULL;
    EXPECT(PRISM_FILE, "nowhere.safetensors",
           prism_model_load(*engine, "nowhere.safetensors", &bad));
    EXPECT(PRISM_INVALID_ARGUMENT, "path is NULL", prism_model_load(*engine, NULL, &bad));
    EXPECT(PRISM_INVALID_ARGUMENT, "NULL where an engine", prism_model_load(NULL, path, &bad));
    EXPECT(PRISM_INVALID_ARGUMENT, "model is NULL", prism_model_load(*engine, path, NULL));
    EXPECT(PRISM_FILE, "model in memory",
           prism_model_load_memory(*engine, "rubbish rubbish", 15, &bad));
    EXPECT(PRISM_FILE, "model in memory", prism_model_load_memory(*engine, "", 0, &bad));
    EXPECT(PRISM_INVALID_ARGUMENT, "data is NULL",
           prism_model_load_memory(*engine, NULL, 15, &bad));
    EXPECT(PRISM_INVALID_ARGUMENT, "more bytes",
           prism_model_load_memory(*engine, "x", (size_t)-1, &bad));
    TRUE(bad == NULL);
    FILE *file = fopen(path, "rb");
    TRUE(file != NULL);
    if (!file) exit(1);
    fseek(file, 0, SEEK_END);
    size_t size = (size_t)ftell(file);
    rewind(file);
    char *bytes = malloc(size);
    TRUE(fread(bytes, 1, size, file) == size);
    fclose(file);
    EXPECT(PRISM_FILE, "", prism_model_load_memory(*engine, bytes, size / 2, &bad));
    OK(prism_model_load_memory(*engine, bytes, size, model));
    free(bytes);
    prism_model_info info = {0};
    EXPECT(PRISM_INVALID_ARGUMENT, "struct_size", prism_model_get_info(*model, &info));
    EXPECT(PRISM_INVALID_ARGUMENT, "NULL", prism_model_get_info(*model, NULL));
    info.struct_size = sizeof info;
    OK(prism_model_get_info(*model, &info));
    TRUE(info.struct_size == sizeof info && info.patch_edge % 16 == 0 && info.parameters > 1000);
}

static void handles(prism_engine *engine, prism_model *model) {
    /* The wrong kind, a number, an address, a handle that was given back. */
    prism_model_info info = {0};
    info.struct_size = sizeof info;
    EXPECT(PRISM_INVALID_HANDLE, "is an engine, expected a model",
           prism_model_get_info((prism_model *)engine, &info));
    EXPECT(PRISM_INVALID_HANDLE, "is invalid",
           prism_model_get_info((prism_model *)(uintptr_t)12345, &info));
    EXPECT(PRISM_INVALID_HANDLE, "is invalid", prism_model_get_info((prism_model *)&info, &info));
    EXPECT(PRISM_INVALID_HANDLE, "is invalid",
           prism_model_get_info((prism_model *)UINTPTR_MAX, &info));
    EXPECT(PRISM_INVALID_HANDLE, "expected an engine", prism_engine_free((prism_engine *)model));
    prism_engine *spare = NULL;
    OK(prism_engine_open("cpu", NULL, &spare));
    OK(prism_engine_free(spare));
    EXPECT(PRISM_INVALID_HANDLE, "freed", prism_engine_free(spare));
    EXPECT(PRISM_INVALID_HANDLE, "freed", prism_engine_describe(spare, NULL, 0, NULL));
    OK(prism_engine_free(NULL));
    OK(prism_model_free(NULL));
    OK(prism_volume_free(NULL));
    OK(prism_session_free(NULL));
    OK(prism_prediction_free(NULL));
    EXPECT(PRISM_INVALID_ARGUMENT, "NULL where a session", prism_session_undo(NULL));
    EXPECT(PRISM_INVALID_ARGUMENT, "NULL where a model", prism_model_warm_up(NULL));
    TRUE(strcmp(prism_status_name(-1), "unknown status") == 0 &&
         strcmp(prism_status_name(1000), "unknown status") == 0);
}

static void volumes(const char *folder) {
    prism_volume *volume = NULL;
    char path[4096];
    EXPECT(PRISM_FILE, "nowhere.nii", prism_volume_read("nowhere.nii", -1, &volume));
    EXPECT(PRISM_INVALID_ARGUMENT, "which is -7", prism_volume_read("nowhere.nii", -7, &volume));
    EXPECT(PRISM_INVALID_ARGUMENT, "path is NULL", prism_volume_read(NULL, -1, &volume));
    EXPECT(PRISM_INVALID_ARGUMENT, "volume is NULL", prism_volume_read("x.nii", -1, NULL));
    snprintf(path, sizeof path, "%s/short.nii", folder);
    FILE *file = fopen(path, "wb");
    if (!file) exit(1);
    fputs("not much of a scan", file);
    fclose(file);
    EXPECT(PRISM_FILE, "short.nii", prism_volume_read(path, -1, &volume));

    prism_array a = array();
    EXPECT(PRISM_INVALID_ARGUMENT, "prism_array is NULL", prism_volume_wrap(NULL, &volume));
    EXPECT(PRISM_INVALID_ARGUMENT, "volume is NULL", prism_volume_wrap(&a, NULL));
    a.struct_size = 8;
    EXPECT(PRISM_INVALID_ARGUMENT, "struct_size", prism_volume_wrap(&a, &volume));
    a = array(), a.data = NULL;
    EXPECT(PRISM_INVALID_ARGUMENT, "null", prism_volume_wrap(&a, &volume));
    a = array(), a.element = 10;
    EXPECT(PRISM_INVALID_ARGUMENT, "element is 10", prism_volume_wrap(&a, &volume));
    a = array(), a.size[1] = 0;
    EXPECT(PRISM_INVALID_ARGUMENT, "1 to 65536", prism_volume_wrap(&a, &volume));
    a = array(), a.size[2] = (size_t)-1;
    EXPECT(PRISM_INVALID_ARGUMENT, "1 to 65536", prism_volume_wrap(&a, &volume));
    a = array(), a.strides[0] = a.strides[1] = a.strides[2] = 2;
    EXPECT(PRISM_INVALID_ARGUMENT, "overlap", prism_volume_wrap(&a, &volume));
    a = array(), a.strides[0] = PTRDIFF_MAX, a.strides[1] = 2, a.strides[2] = 2 * EDGE;
    EXPECT(PRISM_INVALID_ARGUMENT, "beyond memory", prism_volume_wrap(&a, &volume));
    a = array(), a.strides[0] = PTRDIFF_MIN, a.strides[1] = 2, a.strides[2] = 2 * EDGE;
    EXPECT(PRISM_INVALID_ARGUMENT, "beyond memory", prism_volume_wrap(&a, &volume));
    double singular[16] = {0}, skewed[16] = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0.5, 1},
           odd[3] = {1, NAN, 1};
    singular[15] = 1;
    a = array(), a.affine = singular;
    EXPECT(PRISM_INVALID_ARGUMENT, "inverted", prism_volume_wrap(&a, &volume));
    a.affine = skewed;
    EXPECT(PRISM_INVALID_ARGUMENT, "last row", prism_volume_wrap(&a, &volume));
    a.affine = NULL, a.spacing = odd;
    EXPECT(PRISM_INVALID_ARGUMENT, "inverted", prism_volume_wrap(&a, &volume));
    odd[1] = -3;
    OK(prism_volume_wrap(&a, &volume)); /* a mirrored axis is a place like any other */
    prism_volume_info info = {0};
    info.struct_size = sizeof info;
    OK(prism_volume_get_info(volume, &info));
    TRUE(info.spacing[1] == 3 && info.affine[5] == -3 && info.affine[15] == 1 &&
         info.size[2] == EDGE);
    OK(prism_volume_free(volume));

    float nothing[8] = {NAN, NAN, INFINITY, NAN, -INFINITY, NAN, NAN, NAN};
    a = array(), a.data = nothing, a.element = PRISM_FLOAT32, a.size[0] = a.size[1] = a.size[2] = 2;
    volume = NULL;
    EXPECT(PRISM_INVALID_ARGUMENT, "finite", prism_volume_wrap(&a, &volume));
    TRUE(volume == NULL);
    int before = messages;
    nothing[3] = 5;
    OK(prism_volume_wrap(&a, &volume));
    TRUE(messages == before + 1);
    OK(prism_volume_free(volume));
}

static prism_prompts prompts(void) {
    static const double box[6] = {12, 12, 12, 28, 28, 28}, point[3] = {20, 20, 20};
    prism_prompts p = {0};
    p.struct_size = sizeof p;
    p.points = point;
    p.point_count = 1;
    p.bounds = box;
    return p;
}

static void bad_prompts(prism_session *session) {
    double point[6] = {20, 20, 20, 1, 2, NAN}, box[6] = {12, 12, 12, 12, 28, 28},
           far[3] = {1e300, 0, 0};
    int32_t scribble[3] = {5, -1, 5};
    uint8_t label = 2;
    prism_prediction *none = NULL;
    prism_prompts p = {0};
    EXPECT(PRISM_INVALID_ARGUMENT, "prism_prompts is NULL",
           prism_session_interact(session, NULL, &none));
    EXPECT(PRISM_INVALID_ARGUMENT, "struct_size", prism_session_interact(session, &p, &none));
    p.struct_size = sizeof p;
    EXPECT(PRISM_PROMPT, "needs a point", prism_session_interact(session, &p, &none));
    EXPECT(PRISM_PROMPT, "needs a point", prism_session_encode(session, &p));
    p.point_count = 1;
    EXPECT(PRISM_INVALID_ARGUMENT, "points is NULL", prism_session_interact(session, &p, &none));
    p.points = point, p.point_count = (size_t)-1;
    EXPECT(PRISM_INVALID_ARGUMENT, "were given", prism_session_interact(session, &p, &none));
    p.point_count = 2;
    EXPECT(PRISM_PROMPT, "", prism_session_interact(session, &p, &none));
    p.points = far, p.point_count = 1;
    EXPECT(PRISM_PROMPT, "outside", prism_session_interact(session, &p, &none));
    p.points = point, p.point_labels = &label;
    EXPECT(PRISM_INVALID_ARGUMENT, "is 2", prism_session_interact(session, &p, &none));
    p = prompts(), p.bounds = box;
    EXPECT(PRISM_PROMPT, "empty along i", prism_session_interact(session, &p, &none));
    box[3] = INFINITY;
    EXPECT(PRISM_INVALID_ARGUMENT, "inf", prism_session_interact(session, &p, &none));
    p = prompts(), p.scribble = scribble, p.scribble_count = 1;
    EXPECT(PRISM_PROMPT, "outside", prism_session_interact(session, &p, &none));
    p = prompts(), p.space = 9;
    EXPECT(PRISM_INVALID_ARGUMENT, "space is 9", prism_session_interact(session, &p, &none));
    p = prompts(), p.line_count = 1;
    EXPECT(PRISM_INVALID_ARGUMENT, "lines is NULL", prism_session_interact(session, &p, &none));
    p.lines = point;
    EXPECT(PRISM_PROMPT, "expected numbers", prism_session_interact(session, &p, &none));
    p = prompts(), p.points = point + 3, p.space = PRISM_RAS;
    EXPECT(PRISM_PROMPT, "expected numbers", prism_session_interact(session, &p, &none));
    p = prompts(), p.lasso = point, p.lasso_count = 2;
    EXPECT(PRISM_PROMPT, "at least three", prism_session_interact(session, &p, &none));
    p.lasso = point, p.lasso_count = (size_t)-1;
    EXPECT(PRISM_INVALID_ARGUMENT, "were given", prism_session_interact(session, &p, &none));
    p = prompts(), p.dense_kind = 3;
    EXPECT(PRISM_INVALID_ARGUMENT, "dense_kind is 3", prism_session_interact(session, &p, &none));
    p.dense_kind = PRISM_DENSE_MASK;
    EXPECT(PRISM_INVALID_ARGUMENT, "dense is NULL", prism_session_interact(session, &p, &none));
    TRUE(none == NULL);
    EXPECT(PRISM_NOTHING, "no prediction", prism_session_get_prediction(session, &none));
    EXPECT(PRISM_NOTHING, "undo", prism_session_undo(session));
    EXPECT(PRISM_NOTHING, "redo", prism_session_redo(session));
    prism_patch_info patch = {0};
    patch.struct_size = sizeof patch;
    EXPECT(PRISM_NOTHING, "not encoded", prism_session_get_patch(session, &patch));
    OK(prism_session_reset(session));
}

static void predictions(prism_session *session, const char *folder) {
    prism_prediction *prediction = NULL;
    prism_prompts p = prompts();
    OK(prism_session_interact(session, &p, &prediction));
    enum { ALL = EDGE * EDGE * EDGE };
    uint8_t *mask = malloc(ALL), *turned = malloc(ALL);
    float *logits = malloc(ALL * sizeof *logits);
    size_t needed = 0;
    OK(prism_prediction_get_mask(prediction, PRISM_GRID_VOLUME, NULL, 0, NULL, &needed));
    TRUE(needed == ALL);
    memset(mask, 9, ALL);
    EXPECT(PRISM_BUFFER_TOO_SMALL, "needs 64000",
           prism_prediction_get_mask(prediction, PRISM_GRID_VOLUME, mask, ALL - 1, NULL, &needed));
    TRUE(mask[0] == 9);
    OK(prism_prediction_get_mask(prediction, PRISM_GRID_VOLUME, mask, ALL, NULL, NULL));
    OK(prism_prediction_get_logits(prediction, PRISM_GRID_VOLUME, logits, ALL * sizeof *logits,
                                   NULL, NULL));
    for (int i = 0; i < ALL; i++) TRUE(mask[i] == (logits[i] > 0) && isfinite(logits[i]));
    /* k fastest: the same voxels elsewhere. */
    ptrdiff_t strides[3] = {EDGE * EDGE, EDGE, 1}, back[3] = {-1, EDGE, EDGE * EDGE},
              flat[3] = {1, 1, 1};
    OK(prism_prediction_get_mask(prediction, PRISM_GRID_VOLUME, turned, ALL, strides, NULL));
    for (int i = 0; i < EDGE; i++)
        for (int j = 0; j < EDGE; j++)
            for (int k = 0; k < EDGE; k++)
                TRUE(turned[(i * EDGE + j) * EDGE + k] == mask[(k * EDGE + j) * EDGE + i]);
    EXPECT(PRISM_INVALID_ARGUMENT, "positive strides",
           prism_prediction_get_mask(prediction, PRISM_GRID_VOLUME, turned, ALL, back, NULL));
    EXPECT(PRISM_INVALID_ARGUMENT, "overlap",
           prism_prediction_get_mask(prediction, PRISM_GRID_VOLUME, turned, ALL, flat, NULL));
    EXPECT(PRISM_INVALID_ARGUMENT, "grid is 5",
           prism_prediction_get_mask(prediction, 5, mask, ALL, NULL, NULL));
    EXPECT(PRISM_INVALID_ARGUMENT, "both NULL",
           prism_prediction_get_mask(prediction, PRISM_GRID_PATCH, NULL, 0, NULL, NULL));

    prism_prediction_info info = {0};
    info.struct_size = sizeof info;
    OK(prism_prediction_get_info(prediction, &info));
    TRUE(info.candidates >= 1 && info.selected < info.candidates && info.seconds[1] > 0);
    float scores[16];
    size_t count = 0;
    OK(prism_prediction_get_scores(prediction, NULL, 0, &count));
    TRUE(count == info.candidates && count < 16);
    EXPECT(PRISM_BUFFER_TOO_SMALL, "", prism_prediction_get_scores(prediction, scores, 0, NULL));
    OK(prism_prediction_get_scores(prediction, scores, count, NULL));
    /* Not calibrated: what to expect is not known. */
    TRUE(isnan(info.score) && scores[info.selected] > 0 && scores[info.selected] < 1);
    TRUE(info.looks >= 1);
    /* A program from before structures grew. */
    prism_prediction_info old = {0};
    old.struct_size = offsetof(prism_prediction_info, looks), old.looks = 77;
    OK(prism_prediction_get_info(prediction, &old));
    TRUE(old.looks == 77 && old.candidates == info.candidates &&
         old.struct_size == offsetof(prism_prediction_info, looks));
    EXPECT(PRISM_INVALID_ARGUMENT, "candidate 99",
           prism_prediction_get_candidate(prediction, 99, mask, ALL, NULL, NULL));
    OK(prism_prediction_get_candidate(prediction, info.selected, NULL, 0, NULL, &needed));
    uint8_t *candidate = malloc(needed);
    OK(prism_prediction_get_candidate(prediction, info.selected, candidate, needed, NULL, NULL));
    free(candidate);

    char path[4096];
    snprintf(path, sizeof path, "%s/no/such/folder/mask.nii.gz", folder);
    EXPECT(PRISM_FILE, "folder", prism_prediction_save_mask(prediction, path));
    EXPECT(PRISM_FILE, ".nii", prism_prediction_save_mask(prediction, "mask.jpg"));
    EXPECT(PRISM_INVALID_ARGUMENT, "path is NULL", prism_prediction_save_mask(prediction, NULL));
    snprintf(path, sizeof path, "%s/mask.nii.gz", folder);
    OK(prism_prediction_save_mask(prediction, path));

    /* The mask, and logits, as prompts; a box in millimetres; a scribble off the object. */
    int32_t scribble[6] = {13, 13, 13, 14, 13, 13};
    uint8_t off[2] = {0, 0};
    double corners[6] = {-8, -8, -8, 8, 8, 8};
    p = prompts(), p.points = NULL, p.point_count = 0, p.dense = mask,
        p.dense_kind = PRISM_DENSE_MASK, p.bounds = corners, p.space = PRISM_RAS;
    OK(prism_prediction_get_mask(prediction, PRISM_GRID_VOLUME, mask, ALL, NULL, NULL));
    OK(prism_session_interact(session, &p, NULL));
    p = prompts(), p.dense = logits, p.dense_kind = PRISM_DENSE_LOGITS, p.scribble = scribble,
        p.scribble_labels = off, p.scribble_count = 2;
    /* One that is no number is named, alone or among many. */
    const float rubbish[3] = {NAN, INFINITY, -INFINITY};
    const char *const named[3] = {"NaN at voxel [1, 2, 3]", "are inf at voxel [1, 2, 3]",
                                  "-inf at voxel [1, 2, 3]"};
    float *one = logits + (3 * EDGE + 2) * EDGE + 1, was = *one;
    for (int n = 0; n < 3; n++) {
        *one = rubbish[n];
        EXPECT(PRISM_PROMPT, named[n], prism_session_interact(session, &p, NULL));
        EXPECT(PRISM_PROMPT, named[n], prism_session_encode(session, &p));
    }
    *one = was;
    OK(prism_session_interact(session, &p, NULL));
    for (int i = 0; i < ALL; i++) logits[i] = NAN;
    EXPECT(PRISM_PROMPT, "NaN at voxel [0, 0, 0]", prism_session_interact(session, &p, NULL));
    size_t undo = 0, redo = 0;
    OK(prism_session_undo(session));
    OK(prism_session_get_depth(session, &undo, &redo));
    OK(prism_session_get_depth(session, NULL, NULL));
    TRUE(undo == 2 && redo == 1);
    prism_patch_info patch = {0};
    patch.struct_size = sizeof patch;
    OK(prism_session_get_patch(session, &patch));
    TRUE(patch.edge > 0 && patch.bytes > 0);

    OK(prism_prediction_free(prediction));
    EXPECT(PRISM_INVALID_HANDLE, "freed",
           prism_prediction_get_mask(prediction, PRISM_GRID_VOLUME, mask, ALL, NULL, NULL));
    free(mask), free(turned), free(logits);
}

static void put(const char *path, const void *bytes, size_t size) {
    FILE *file = fopen(path, "wb");
    if (!file || fwrite(bytes, 1, size, file) != size) exit(1);
    fclose(file);
}

/* What a volume was read from is not written over by its mask, by any of its names: voxels of a
 * name that a mask can have, and of one that the voxels of a mask would get. */
static void inputs(prism_model *model, const char *folder) {
    static const char *const endings[2][2] = {{".nii", ".nii"}, {".zraw", ".mhd"}},
                             *const names[4] = {"scan", "./scan", "soft", "hard"};
    static int16_t again[EDGE * EDGE * EDGE];
    char header[4096], data[4096], soft[4096], hard[4096], out[4096], target[64], text[512];
    snprintf(header, sizeof header, "%s/scan.nhdr", folder);
    for (int n = 0; n < 2; n++) {
        const char *ending = endings[n][0];
        snprintf(data, sizeof data, "%s/scan%s", folder, ending);
        snprintf(soft, sizeof soft, "%s/soft%s", folder, ending);
        snprintf(hard, sizeof hard, "%s/hard%s", folder, ending);
        snprintf(target, sizeof target, "scan%s", ending);
        snprintf(text, sizeof text,
                 "NRRD0004\ntype: short\ndimension: 3\nsizes: %d %d %d\nspace: RAS\n"
                 "space directions: (1,0,0) (0,1,0) (0,0,1)\nendian: little\nencoding: raw\n"
                 "data file: %s\n",
                 EDGE, EDGE, EDGE, target);
        put(header, text, strlen(text));
        put(data, voxels, sizeof voxels);
        remove(soft), remove(hard);
        TRUE(symlink(target, soft) == 0 && link(data, hard) == 0);
        prism_volume *volume = NULL;
        prism_session *session = NULL;
        prism_prediction *prediction = NULL;
        prism_prompts p = prompts();
        OK(prism_volume_read(header, -1, &volume));
        OK(prism_session_open(model, volume, NULL, &session));
        OK(prism_session_interact(session, &p, &prediction));
        OK(prism_session_free(session));
        OK(prism_volume_free(volume));
        for (int i = 0; i < 4; i++) {
            snprintf(out, sizeof out, "%s/%s%s", folder, names[i], endings[n][1]);
            EXPECT(PRISM_FILE, "is an input", prism_prediction_save_mask(prediction, out));
        }
        FILE *file = fopen(data, "rb");
        TRUE(file && fread(again, 1, sizeof again, file) == sizeof again &&
             memcmp(again, voxels, sizeof voxels) == 0);
        if (file) fclose(file);
        snprintf(out, sizeof out, "%s/other%s", folder, endings[n][1]);
        OK(prism_prediction_save_mask(prediction, out));
        OK(prism_prediction_free(prediction));
    }
}

struct caller {
    prism_session *session;
    int calls, busy, cancelled;
};

static int32_t meddle(void *user, double done, const char *stage) {
    struct caller *c = user;
    TRUE(done > 0 && done <= 1 && strlen(stage) > 0);
    EXPECT(PRISM_BUSY, "another call", prism_session_undo(c->session));
    return ++c->calls < 3;
}

static void *click(void *user) {
    struct caller *c = user;
    for (int i = 0; i < 5; i++) {
        /* Now on the object, now off it: a click that the answer obeys already is no work. */
        uint8_t label = i % 2 == 0;
        prism_prompts p = prompts();
        p.point_labels = &label;
        prism_prediction *prediction = NULL;
        prism_status status = prism_session_interact(c->session, &p, &prediction);
        if (status == PRISM_BUSY) c->busy++;
        else if (status == PRISM_CANCELLED) c->cancelled++;
        else if (status != PRISM_OK && status != PRISM_INVALID_HANDLE) failures++;
        prism_prediction_free(prediction);
    }
    return NULL;
}

static void threads(prism_session *session) {
    /* A callback that meddles, and cancels at its third call. Nothing is answered yet that the
     * click could find to be right already. */
    struct caller one = {session, 0, 0, 0}, two = one;
    prism_prompts p = prompts();
    OK(prism_session_reset(session));
    OK(prism_session_set_progress(session, meddle, &one));
    EXPECT(PRISM_CANCELLED, "cancelled", prism_session_interact(session, &p, NULL));
    TRUE(one.calls == 3);
    OK(prism_session_set_progress(session, NULL, NULL));
    OK(prism_session_interact(session, &p, NULL));
    OK(prism_session_cancel(session)); /* nothing is under way: the next call is not its business */
    OK(prism_session_interact(session, &p, NULL));

    /* Two threads on one session, one on a fork of it, a fourth that cancels and then gives the
     * session back under their hands. */
    prism_session *other = NULL;
    EXPECT(PRISM_INVALID_ARGUMENT, "another is NULL", prism_session_fork(session, NULL));
    OK(prism_session_fork(session, &other));
    struct caller three = {other, 0, 0, 0};
    pthread_t ids[3];
    pthread_create(&ids[0], NULL, click, &one);
    pthread_create(&ids[1], NULL, click, &two);
    pthread_create(&ids[2], NULL, click, &three);
    prism_session_cancel(session);
    OK(prism_session_free(session));
    for (int i = 0; i < 3; i++) pthread_join(ids[i], NULL);
    TRUE(three.busy == 0 && three.cancelled == 0);
    OK(prism_session_free(other));
    EXPECT(PRISM_INVALID_HANDLE, "freed", prism_session_free(session));
}

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    for (int i = 0; i < EDGE * EDGE * EDGE; i++) {
        int x = i % EDGE - 20, y = i / EDGE % EDGE - 20, z = i / EDGE / EDGE - 20;
        voxels[i] = (int16_t)(x * x + y * y + z * z < 49 ? 80 : -20) + (int16_t)(i * 7919 % 21);
    }
    TRUE(prism_abi_version() == PRISM_ABI_VERSION && strlen(prism_version()) >= 5 &&
         strcmp(prism_last_error(), "") == 0);
    OK(prism_set_log(count_message, &messages));
    prism_engine *engine = NULL;
    prism_model *model = NULL;
    prism_volume *volume = NULL;
    prism_session *session = NULL;
    engines(argv[1], &engine, &model);
    handles(engine, model);
    volumes(argv[2]);

    prism_array a = array();
    OK(prism_volume_wrap(&a, &volume));
    prism_session_options options = {0};
    EXPECT(PRISM_INVALID_ARGUMENT, "struct_size",
           prism_session_open(model, volume, &options, &session));
    options.struct_size = sizeof options, options.spacing = -1;
    EXPECT(PRISM_INVALID_ARGUMENT, "spacing is -1",
           prism_session_open(model, volume, &options, &session));
    options.spacing = NAN;
    EXPECT(PRISM_INVALID_ARGUMENT, "spacing is NaN",
           prism_session_open(model, volume, &options, &session));
    options.spacing = 1, options.released = 2;
    EXPECT(PRISM_INVALID_ARGUMENT, "released is 2",
           prism_session_open(model, volume, &options, &session));
    options.released = 0, options.intensity = 6;
    EXPECT(PRISM_INVALID_ARGUMENT, "intensity is 6",
           prism_session_open(model, volume, &options, &session));
    options.intensity = PRISM_INTENSITY_GIVEN;
    EXPECT(PRISM_INVALID_ARGUMENT, "sd above 0",
           prism_session_open(model, volume, &options, &session));
    options.clip[0] = -50, options.clip[1] = 120, options.mean = 10, options.sd = 40;
    EXPECT(PRISM_INVALID_HANDLE, "expected a volume",
           prism_session_open(model, (prism_volume *)model, &options, &session));
    EXPECT(PRISM_INVALID_ARGUMENT, "session is NULL",
           prism_session_open(model, volume, &options, NULL));
    OK(prism_session_open(model, volume, &options, &session));
    inputs(model, argv[2]);
    /* What the session needs it keeps. */
    OK(prism_engine_free(engine));
    OK(prism_model_free(model));
    OK(prism_volume_free(volume));
    EXPECT(PRISM_INVALID_HANDLE, "freed", prism_session_open(model, volume, &options, &session));

    bad_prompts(session);
    predictions(session, argv[2]);
    threads(session);
    OK(prism_set_log(NULL, NULL));
    if (failures == 0) puts("survived");
    return failures != 0;
}
