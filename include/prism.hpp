// prism for C++17: owning handles, errors as exceptions. It wraps prism.h, which documents the
// calls.
#ifndef PRISM_HPP
#define PRISM_HPP

#include "prism.h"

#include <array>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace prism {

// A failed call: its status, and the library's message.
class Error : public std::runtime_error {
public:
    Error(prism_status status, const std::string &message)
        : std::runtime_error(message), status(status) {}
    prism_status status;
};

inline void check(prism_status status) {
    if (status != PRISM_OK) throw Error(status, prism_last_error());
}

template <class T, prism_status (*Free)(T *)>
struct Deleter {
    void operator()(T *handle) const noexcept { Free(handle); }
};
template <class T, prism_status (*Free)(T *)>
using Handle = std::unique_ptr<T, Deleter<T, Free>>;

// The prompts of one interaction; positions are in `space`.
struct Prompts {
    std::vector<std::array<double, 3>> points;
    std::vector<std::uint8_t> labels; // of the points: 1 on the object, 0 off it; empty: all on it
    std::vector<std::array<std::int32_t, 3>> scribble;
    std::vector<std::uint8_t> scribble_labels;
    const std::array<double, 6> *box = nullptr; // i0, j0, k0, i1, j1, k1
    std::vector<std::array<double, 6>> lines;   // from border to border of the object
    std::vector<std::array<double, 3>> lasso;   // corners of an outline on one slice
    const std::uint8_t *others = nullptr;       // a mask that the result never enters, i fastest
    prism_space space = PRISM_VOXELS;

    Prompts &point(double i, double j, double k, bool on = true) {
        points.push_back({i, j, k});
        labels.push_back(on);
        return *this;
    }

    // The C structure; valid as long as this object exists unchanged.
    prism_prompts raw() const {
        if ((!labels.empty() && labels.size() != points.size()) ||
            (!scribble_labels.empty() && scribble_labels.size() != scribble.size()))
            throw std::invalid_argument("expected as many labels as points, or none");
        prism_prompts p{};
        p.struct_size = sizeof p;
        p.space = space;
        p.points = points.empty() ? nullptr : points.front().data();
        p.point_labels = labels.empty() ? nullptr : labels.data();
        p.point_count = points.size();
        p.bounds = box ? box->data() : nullptr;
        p.scribble = scribble.empty() ? nullptr : scribble.front().data();
        p.scribble_labels = scribble_labels.empty() ? nullptr : scribble_labels.data();
        p.scribble_count = scribble.size();
        p.lines = lines.empty() ? nullptr : lines.front().data();
        p.line_count = lines.size();
        p.lasso = lasso.empty() ? nullptr : lasso.front().data();
        p.lasso_count = lasso.size();
        p.others = others;
        return p;
    }
};

class Engine {
public:
    explicit Engine(const std::string &device = "cpu",
                    const prism_engine_options *options = nullptr) {
        prism_engine *made = nullptr;
        check(prism_engine_open(device.c_str(), options, &made));
        handle.reset(made);
    }
    std::string describe() const {
        std::size_t needed = 0;
        check(prism_engine_describe(handle.get(), nullptr, 0, &needed));
        std::string text(needed, '\0');
        check(prism_engine_describe(handle.get(), text.data(), needed, nullptr));
        text.pop_back();
        return text;
    }
    Handle<prism_engine, prism_engine_free> handle;
};

class Model {
public:
    Model(const Engine &engine, const std::string &path) {
        prism_model *made = nullptr;
        check(prism_model_load(engine.handle.get(), path.c_str(), &made));
        handle.reset(made);
    }
    Model(const Engine &engine, const void *data, std::size_t size) {
        prism_model *made = nullptr;
        check(prism_model_load_memory(engine.handle.get(), data, size, &made));
        handle.reset(made);
    }
    void warm_up() { check(prism_model_warm_up(handle.get())); }
    prism_model_info info() const {
        prism_model_info info{};
        info.struct_size = sizeof info;
        check(prism_model_get_info(handle.get(), &info));
        return info;
    }
    Handle<prism_model, prism_model_free> handle;
};

class Volume {
public:
    explicit Volume(const std::string &path, int which = -1) {
        prism_volume *made = nullptr;
        check(prism_volume_read(path.c_str(), which, &made));
        handle.reset(made);
    }
    // The array must outlive this and all sessions on it.
    explicit Volume(const prism_array &array) {
        prism_volume *made = nullptr;
        check(prism_volume_wrap(&array, &made));
        handle.reset(made);
    }
    prism_volume_info info() const {
        prism_volume_info info{};
        info.struct_size = sizeof info;
        check(prism_volume_get_info(handle.get(), &info));
        return info;
    }
    Handle<prism_volume, prism_volume_free> handle;
};

class Prediction {
public:
    explicit Prediction(prism_prediction *owned) : handle(owned) {}
    prism_prediction_info info() const {
        prism_prediction_info info{};
        info.struct_size = sizeof info;
        check(prism_prediction_get_info(handle.get(), &info));
        return info;
    }
    std::vector<float> scores() const {
        std::size_t count = 0;
        check(prism_prediction_get_scores(handle.get(), nullptr, 0, &count));
        std::vector<float> scores(count);
        check(prism_prediction_get_scores(handle.get(), scores.data(), count, nullptr));
        return scores;
    }
    // i fastest.
    std::vector<std::uint8_t> mask(prism_grid grid = PRISM_GRID_VOLUME) const {
        std::size_t bytes = 0;
        check(prism_prediction_get_mask(handle.get(), grid, nullptr, 0, nullptr, &bytes));
        std::vector<std::uint8_t> mask(bytes);
        check(prism_prediction_get_mask(handle.get(), grid, mask.data(), bytes, nullptr, nullptr));
        return mask;
    }
    std::vector<float> logits(prism_grid grid = PRISM_GRID_VOLUME) const {
        std::size_t bytes = 0;
        check(prism_prediction_get_logits(handle.get(), grid, nullptr, 0, nullptr, &bytes));
        std::vector<float> logits(bytes / sizeof(float));
        check(prism_prediction_get_logits(handle.get(), grid, logits.data(), bytes, nullptr,
                                          nullptr));
        return logits;
    }
    void save_mask(const std::string &path) const {
        check(prism_prediction_save_mask(handle.get(), path.c_str()));
    }
    Handle<prism_prediction, prism_prediction_free> handle;
};

class Session {
public:
    Session(const Model &model, const Volume &volume,
            const prism_session_options *options = nullptr) {
        prism_session *made = nullptr;
        check(prism_session_open(model.handle.get(), volume.handle.get(), options, &made));
        handle.reset(made);
    }
    void encode(const Prompts &prompts) {
        const prism_prompts raw = prompts.raw();
        check(prism_session_encode(handle.get(), &raw));
    }
    Prediction interact(const Prompts &prompts) { return interact(prompts.raw()); }
    Prediction interact(const prism_prompts &prompts) {
        prism_prediction *made = nullptr;
        check(prism_session_interact(handle.get(), &prompts, &made));
        return Prediction(made);
    }
    Prediction prediction() const {
        prism_prediction *made = nullptr;
        check(prism_session_get_prediction(handle.get(), &made));
        return Prediction(made);
    }
    // False if there is nothing to undo or redo.
    bool undo() { return stepped(prism_session_undo(handle.get())); }
    bool redo() { return stepped(prism_session_redo(handle.get())); }
    void reset() { check(prism_session_reset(handle.get())); }
    // For another object on the same encoded scan.
    Session fork() const {
        prism_session *made = nullptr;
        check(prism_session_fork(handle.get(), &made));
        return Session(made);
    }
    Handle<prism_session, prism_session_free> handle;

private:
    explicit Session(prism_session *owned) : handle(owned) {}
    static bool stepped(prism_status status) {
        if (status != PRISM_NOTHING) check(status);
        return status == PRISM_OK;
    }
};

} // namespace prism

#endif
