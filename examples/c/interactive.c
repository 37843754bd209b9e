/* What a viewer does: encodes the scan at a box before the user clicks, answers clicks, takes one
 * back: interactive MODEL IMAGE I0,J0,K0,I1,J1,K1
 *
 * The clicks are made up: on the object's centre, then off it at the box's corner. */
#include "common.h"

static int32_t progress(void *user, double done, const char *stage) {
    (void)stage;
    *(double *)user = done;
    return 1; /* 0 would cancel */
}

/* Voxels on the object, read into the viewer's own buffer. */
static size_t voxels(prism_session *session, uint8_t *mask, size_t size) {
    prism_prediction *prediction;
    CHECK(prism_session_get_prediction(session, &prediction));
    CHECK(prism_prediction_get_mask(prediction, PRISM_GRID_VOLUME, mask, size, NULL, NULL));
    CHECK(prism_prediction_free(prediction));
    size_t count = 0;
    for (size_t i = 0; i < size; i++) count += mask[i];
    return count;
}

int main(int argc, char **argv) {
    if (argc < 4) {
        fprintf(stderr, "usage: %s MODEL IMAGE I0,J0,K0,I1,J1,K1\n", argv[0]);
        return 2;
    }
    double box[6], done = 0;
    numbers(argv[3], box, 6);
    CHECK(prism_set_log(print_message, NULL));
    prism_engine *engine;
    prism_model *model;
    prism_volume *volume;
    prism_session *session;
    CHECK(prism_engine_open("cpu", NULL, &engine));
    CHECK(prism_model_load(engine, argv[1], &model));
    CHECK(prism_model_warm_up(model));
    CHECK(prism_volume_read(argv[2], -1, &volume));
    prism_volume_info about = {.struct_size = sizeof about};
    CHECK(prism_volume_get_info(volume, &about));
    size_t size = about.size[0] * about.size[1] * about.size[2];
    uint8_t *mask = malloc(size);
    if (!mask) return 1;

    CHECK(prism_session_open(model, volume, NULL, &session));
    CHECK(prism_session_set_progress(session, progress, &done));
    prism_prompts prompts = {.struct_size = sizeof prompts, .bounds = box};
    double start = seconds();
    CHECK(prism_session_encode(session, &prompts));
    printf("encode   %6.1f ms, progress ended at %.2f\n", 1e3 * (seconds() - start), done);

    double centre[3] = {(double)(int)((box[0] + box[3]) / 2), (double)(int)((box[1] + box[4]) / 2),
                        (double)(int)((box[2] + box[5]) / 2)};
    size_t counts[3];
    for (int click = 0; click < 3; click++) {
        /* the third corrects: the box's first corner is not the object */
        uint8_t label = click < 2;
        prompts.points = click < 2 ? centre : box;
        prompts.point_labels = &label;
        prompts.point_count = 1;
        start = seconds();
        CHECK(prism_session_interact(session, &prompts, NULL));
        double answered = seconds();
        counts[click] = voxels(session, mask, size);
        printf("click %d  %6.1f ms, mask in %.1f ms: %zu voxels\n", click + 1,
               1e3 * (answered - start), 1e3 * (seconds() - answered), counts[click]);
        prompts.bounds = NULL; /* it stays */
    }

    CHECK(prism_session_undo(session));
    size_t undone = voxels(session, mask, size);
    CHECK(prism_session_redo(session));
    size_t redone = voxels(session, mask, size);
    printf("undo     %zu voxels, redo %zu\n", undone, redone);
    int right = undone == counts[1] && redone == counts[2];
    CHECK(prism_session_reset(session));
    size_t back, forth;
    CHECK(prism_session_get_depth(session, &back, &forth));
    right = right && back == 0 && forth == 0;

    free(mask);
    CHECK(prism_session_free(session));
    CHECK(prism_volume_free(volume));
    CHECK(prism_model_free(model));
    CHECK(prism_engine_free(engine));
    return right ? 0 : 1;
}
