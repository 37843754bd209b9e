// Segments an object of a scan file by a box and a point, through the C++ wrapper:
// segment_cpp MODEL IMAGE MASK I0,J0,K0,I1,J1,K1 I,J,K
#include <prism.hpp>

#include <chrono>
#include <cstdio>
#include <sstream>

template <std::size_t N>
static std::array<double, N> numbers(const char *text) {
    std::array<double, N> values{};
    std::istringstream in(text);
    char comma = ',';
    for (std::size_t i = 0; i < N; i++)
        if ((i > 0 && (!(in >> comma) || comma != ',')) || !(in >> values[i]))
            throw std::invalid_argument(std::string("expected numbers between commas: ") + text);
    return values;
}

int main(int argc, char **argv) {
    if (argc != 6) {
        std::fprintf(stderr, "usage: %s MODEL IMAGE MASK I0,J0,K0,I1,J1,K1 I,J,K\n", argv[0]);
        return 2;
    }
    try {
        const auto box = numbers<6>(argv[4]);
        const auto point = numbers<3>(argv[5]);
        prism::Engine engine;
        prism::Model model(engine, argv[1]);
        prism::Volume volume(argv[2]);
        prism::Session session(model, volume);
        prism::Prompts prompts;
        prompts.box = &box;
        prompts.point(point[0], point[1], point[2]);

        const auto start = std::chrono::steady_clock::now();
        const prism::Prediction prediction = session.interact(prompts);
        const std::chrono::duration<double, std::milli> taken =
            std::chrono::steady_clock::now() - start;
        prediction.save_mask(argv[3]);
        std::size_t voxels = 0;
        for (auto v : prediction.mask()) voxels += v;
        std::printf("%s: %zu voxels, expected Dice %.2f, %.0f ms on %s\n", argv[3], voxels,
                    prediction.info().score, taken.count(), engine.describe().c_str());

        // What fails says why.
        try {
            session.interact(prism::Prompts().point(1e6, 0, 0));
            return 1;
        } catch (const prism::Error &error) {
            std::printf("as it should, a point outside fails: %s\n", error.what());
            return error.status == PRISM_PROMPT && session.undo() && !session.undo() ? 0 : 1;
        }
    } catch (const std::exception &error) {
        std::fprintf(stderr, "error: %s\n", error.what());
        return 1;
    }
}
