/* Segments an object of a scan file by a box and a point:
 * segment MODEL IMAGE MASK I0,J0,K0,I1,J1,K1 I,J,K [DEVICE] */
#include "common.h"

int main(int argc, char **argv) {
    if (argc < 6) {
        fprintf(stderr, "usage: %s MODEL IMAGE MASK I0,J0,K0,I1,J1,K1 I,J,K [DEVICE]\n", argv[0]);
        return 2;
    }
    double box[6], point[3];
    numbers(argv[4], box, 6);
    numbers(argv[5], point, 3);
    if (prism_abi_version() != PRISM_ABI_VERSION) {
        fprintf(stderr, "libprism has interface version %u, this program was compiled for %u\n",
                prism_abi_version(), PRISM_ABI_VERSION);
        return 1;
    }
    CHECK(prism_set_log(print_message, NULL));

    prism_engine *engine;
    prism_model *model;
    prism_volume *volume;
    prism_session *session;
    prism_prediction *prediction;
    CHECK(prism_engine_open(argc > 6 ? argv[6] : "cpu", NULL, &engine));
    CHECK(prism_model_load(engine, argv[1], &model));
    CHECK(prism_volume_read(argv[2], -1, &volume));
    CHECK(prism_session_open(model, volume, NULL, &session));

    prism_prompts prompts = {
        .struct_size = sizeof prompts, .points = point, .point_count = 1, .bounds = box};
    double start = seconds();
    CHECK(prism_session_interact(session, &prompts, &prediction));
    double taken = seconds() - start;
    CHECK(prism_prediction_save_mask(prediction, argv[3]));

    prism_prediction_info info = {.struct_size = sizeof info};
    CHECK(prism_prediction_get_info(prediction, &info));
    printf("%s: expected Dice %.2f, %.0f ms (%.0f of them to encode the scan)\n", argv[3],
           info.score, 1e3 * taken, 1e3 * info.seconds[1]);

    CHECK(prism_prediction_free(prediction));
    CHECK(prism_session_free(session));
    CHECK(prism_volume_free(volume));
    CHECK(prism_model_free(model));
    CHECK(prism_engine_free(engine));
    return 0;
}
