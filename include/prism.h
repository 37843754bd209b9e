/* prism: interactive segmentation of tumours in 3D scans, for C and languages that call C.
 *
 * Usage: open an engine, load a model, read or wrap a volume, open a session on it, interact for
 * each of the user's prompts, read the prediction.
 *
 * - Every call returns a prism_status; prism_last_error explains a failure. No call aborts the
 *   process because of its arguments, and none writes to the standard streams.
 * - The caller owns handles and frees each with its own _free function, once, in any order:
 *   sessions and predictions keep what they need. A handle that was freed, or is of another kind,
 *   is refused.
 * - Engines, models, volumes and predictions may be used by any number of threads at once. A
 *   session may be used by one thread at a time; a second gets PRISM_BUSY.
 * - Structures begin with struct_size: zero them, then set it to their sizeof. They can
 *   grow without breaking programs that are already compiled.
 * - Voxels are (i, j, k) from 0, in the order of the volume; in dense results i is the fastest
 *   unless strides say otherwise.
 *
 * docs/embedding.md is the tutorial. Generated from src/capi by cbindgen; do not edit. Apache-2.0.
 */

#ifndef PRISM_H
#define PRISM_H

#include <stddef.h>
#include <stdint.h>

/**
 * The version of this interface. It grows by one whenever a program that was compiled against an
 * older header could misbehave; functions and constants that are only added leave it as it is.
 */
#define PRISM_ABI_VERSION 1

/**
 * The logit, on the volume's grid, of voxels for which the session has computed none: far from the
 * object.
 */
#define PRISM_LOGIT_OUTSIDE -100.0

/**
 * The result of a call. If it is not PRISM_OK, prism_last_error has a message, and outputs are
 * unchanged unless a function says otherwise.
 */
typedef enum {
  /**
   * Done.
   */
  PRISM_OK = 0,
  /**
   * An argument is invalid: NULL where a value is required, a size or position out of range, an
   * unknown constant, a path that is not UTF-8.
   */
  PRISM_INVALID_ARGUMENT = 1,
  /**
   * A handle was freed, is of another kind, or is invalid.
   */
  PRISM_INVALID_HANDLE = 2,
  /**
   * A file cannot be read or written, or has invalid content.
   */
  PRISM_FILE = 3,
  /**
   * The device is not available, does not support the request, or failed.
   */
  PRISM_DEVICE = 4,
  /**
   * The buffer is smaller than the result. The size that is needed was stored; the buffer is
   * unchanged.
   */
  PRISM_BUFFER_TOO_SMALL = 5,
  /**
   * Another thread, or the caller of a callback, is using this session; or a callback would have
   * to wait for another call, to free or to replace what it uses.
   */
  PRISM_BUSY = 6,
  /**
   * A progress callback returned 0, or prism_session_cancel was called.
   */
  PRISM_CANCELLED = 7,
  /**
   * There is nothing to undo, redo or read yet.
   */
  PRISM_NOTHING = 8,
  /**
   * The prompts cannot be used with this volume: there are none, one lies outside, or a position
   * or logit is NaN or infinite.
   */
  PRISM_PROMPT = 9,
  /**
   * A bug in the library. The handle can still be used; please report the message.
   */
  PRISM_INTERNAL = 10,
  /**
   * The budget or the system refuses the memory that the call would take. Everything that
   * existed before still does.
   */
  PRISM_OUT_OF_MEMORY = 11,
  /**
   * This process is a fork of one that used the library, whose threads do not exist here.
   * Nothing was done.
   */
  PRISM_FORKED = 12,
  /**
   * The network's result is not finite: its weights do not fit the scan's values, or the
   * precision that it runs in. The session is as it was.
   */
  PRISM_NOT_FINITE = 13,
} prism_status;

/**
 * Element types of feature maps on a CUDA device, or of products on the CPU; sums are always
 * float32.
 */
typedef enum {
  /**
   * 32-bit floats. A CUDA device multiplies them on tensor cores, as the sum of three TF32
   * products: within 2^-21, checked against float32's bounds.
   */
  PRISM_F32 = 0,
  /**
   * IEEE half precision: CUDA devices.
   */
  PRISM_F16 = 1,
  /**
   * bfloat16: CUDA devices, and processors with AVX512-BF16.
   */
  PRISM_BF16 = 2,
  /**
   * 32-bit floats, rounded to TF32 for products, as with PyTorch's tf32: CUDA devices.
   */
  PRISM_TF32 = 3,
  /**
   * 32-bit floats in plain arithmetic, as with PyTorch's ieee.
   */
  PRISM_IEEE = 4,
} prism_precision;

/**
 * Types of an array's elements, in the machine's byte order.
 */
typedef enum {
  PRISM_INT8 = 0,
  PRISM_UINT8 = 1,
  PRISM_INT16 = 2,
  PRISM_UINT16 = 3,
  PRISM_INT32 = 4,
  PRISM_UINT32 = 5,
  PRISM_INT64 = 6,
  PRISM_UINT64 = 7,
  PRISM_FLOAT32 = 8,
  PRISM_FLOAT64 = 9,
} prism_element;

/**
 * How intensities are normalised for the model.
 */
typedef enum {
  /**
   * By the statistics of the model's training data, or by percentiles if the model records none
   * or they do not apply to the scan's modality, which the distribution of its values
   * determines. The log says what was decided, and why.
   */
  PRISM_INTENSITY_AUTO = 0,
  /**
   * By the scan's own 0.5 and 99.5 percentiles, and mean and standard deviation between them.
   */
  PRISM_INTENSITY_PERCENTILES = 1,
  /**
   * By clip, mean and sd of the options.
   */
  PRISM_INTENSITY_GIVEN = 2,
  /**
   * What PRISM_INTENSITY_AUTO does for a CT, whatever the values look like.
   */
  PRISM_INTENSITY_CT = 3,
  /**
   * What PRISM_INTENSITY_AUTO does for an MR, whatever the values look like.
   */
  PRISM_INTENSITY_MR = 4,
  /**
   * What PRISM_INTENSITY_AUTO does for a PET, whatever the values look like.
   */
  PRISM_INTENSITY_PET = 5,
} prism_intensity;

/**
 * Coordinates of points and boxes.
 */
typedef enum {
  /**
   * Voxel indices (i, j, k) of the volume, from 0, whole numbers. The end of a box is exclusive.
   */
  PRISM_VOXELS = 0,
  /**
   * Millimetres, x to the right, y to the front, z to the head (NIfTI). A point selects the
   * nearest voxel; a box, given by two opposite corners, the voxels whose centres lie within it.
   */
  PRISM_RAS = 1,
  /**
   * Millimetres, x to the left, y to the back, z to the head (DICOM, ITK).
   */
  PRISM_LPS = 2,
} prism_space;

/**
 * The kind of an interaction's dense prompt: of what prism_prompts.dense points to.
 */
typedef enum {
  /**
   * There is none: the session's last prediction is corrected.
   */
  PRISM_DENSE_NONE = 0,
  /**
   * uint8, nonzero on the object.
   */
  PRISM_DENSE_MASK = 1,
  /**
   * float32, positive on the object. NaN or infinity gives PRISM_PROMPT.
   */
  PRISM_DENSE_LOGITS = 2,
} prism_dense;

/**
 * The grid of what is read.
 */
typedef enum {
  /**
   * The volume's own grid: every voxel. This is the result.
   */
  PRISM_GRID_VOLUME = 0,
  /**
   * The patch, the cube that the model saw last; prism_session_get_patch gives its position. The
   * result there, as the model computed it.
   */
  PRISM_GRID_PATCH = 1,
} prism_grid;

/**
 * A device to compute on: CPU threads, or a GPU. Made by prism_engine_open. Any number of threads
 * may use it at once.
 */
typedef struct prism_engine prism_engine;

/**
 * A network, laid out for an engine. Made by prism_model_load. Any number of sessions and threads
 * may use it at once.
 */
typedef struct prism_model prism_model;

/**
 * An answer: logits, candidates, scores. Made by prism_session_interact or
 * prism_session_get_prediction. It does not change; any number of threads may read it at once.
 */
typedef struct prism_prediction prism_prediction;

/**
 * One object on a volume: its prompts so far, its predictions, what can be undone. Made by
 * prism_session_open or prism_session_fork. One thread at a time: a call while another is under
 * way returns PRISM_BUSY and does nothing; prism_session_cancel alone may come at any time.
 * Different sessions work at the same time, and share the engine's threads.
 */
typedef struct prism_session prism_session;

/**
 * A scan: voxels and where they lie. Made by prism_volume_read or prism_volume_wrap. Any number of
 * sessions and threads may use it at once.
 */
typedef struct prism_volume prism_volume;

/**
 * How to open an engine.
 */
typedef struct {
  /**
   * sizeof(prism_engine_options).
   */
  size_t struct_size;
  /**
   * Number of threads, at most one per processor; 0: one per processor.
   */
  uint32_t threads;
  /**
   * A prism_precision.
   */
  int32_t precision;
  /**
   * The memory budget: bytes that the library may use in this process, for all engines; 0: as it
   * was set before, at first what the machine has; SIZE_MAX: what the machine has. Scans that
   * were read, weights, working memory and encoded patches are counted; any other request must
   * fit what is left. Calls that would need more return PRISM_OUT_OF_MEMORY.
   */
  size_t memory;
} prism_engine_options;

/**
 * Facts about a model.
 */
typedef struct {
  /**
   * sizeof(prism_model_info), set by the caller.
   */
  size_t struct_size;
  /**
   * Voxels along each side of the patch, the cube that the model sees.
   */
  size_t patch_edge;
  /**
   * Spacing of these voxels in mm; a model that fits the cube to a box chooses its own each
   * time.
   */
  double spacing;
  /**
   * Candidate masks of an interaction.
   */
  size_t candidates;
  /**
   * The number of its parameters.
   */
  uint64_t parameters;
} prism_model_info;

/**
 * Called with a message about something unusual and how it was handled. `message` is valid during
 * the call. It runs on the thread of the call that produced the message, within that call,
 * possibly on several threads at once; it must not throw or jump out.
 */
typedef void (*prism_log_callback)(void *user, const char *message);

/**
 * Facts about an answer.
 */
typedef struct {
  /**
   * sizeof(prism_prediction_info), set by the caller.
   */
  size_t struct_size;
  /**
   * Candidate masks.
   */
  size_t candidates;
  /**
   * Index of the candidate that was refined into the result, from 0.
   */
  size_t selected;
  /**
   * The expected Dice of the answer, 0 to 1; NaN if the model is not calibrated, has not run for
   * this answer, or the answer is empty.
   */
  float score;
  /**
   * Points of the interaction that were outside the patch and were left out: only in released
   * sessions, otherwise 0.
   */
  size_t left_out;
  /**
   * Points of the interaction that only the refiner saw, because there were more than the prompt
   * encoder takes.
   */
  size_t thinned;
  /**
   * Seconds that it took: cutting the patch out of the scan, encoding it (both 0 if that was
   * done before), prompts, decoder, refiner. A GPU does the last three in one step, which is
   * counted in the last.
   */
  double seconds[5];
  /**
   * How many times the network was run: 0 if the prompts did not need it.
   */
  size_t looks;
  /**
   * Voxels of the volume that changed from one side to the other.
   */
  size_t changed;
} prism_prediction_info;

/**
 * How to open a session.
 */
typedef struct {
  /**
   * sizeof(prism_session_options).
   */
  size_t struct_size;
  /**
   * Spacing in mm at which the model looks at the scan, below 100; 0: the model's own, or fitted
   * to the box if the model does that.
   */
  double spacing;
  /**
   * A prism_intensity.
   */
  int32_t intensity;
  /**
   * The range with PRISM_INTENSITY_GIVEN: intensities are clipped to clip[0] to clip[1].
   */
  float clip[2];
  /**
   * The mean with PRISM_INTENSITY_GIVEN: it is subtracted from the clipped value.
   */
  float mean;
  /**
   * The standard deviation, above 0, with PRISM_INTENSITY_GIVEN: the difference is divided by
   * it.
   */
  float sd;
  /**
   * Unused: 0.
   */
  int32_t reserved;
  /**
   * 1: the network alone, as in the paper: one patch, the prompts of the last interaction, no
   * guarantee that they are obeyed. 0: the session keeps its guarantees.
   */
  int32_t released;
  /**
   * The most bytes of encoded patches that are kept, so that they need not be encoded again; at
   * most half of the memory budget; 0: 2 GiB.
   */
  size_t memory;
  /**
   * Most interactions that can be undone; older ones are dropped; 0: 1000.
   */
  size_t undo_steps;
  /**
   * Bytes that the undo history may take, at most a quarter of the library's budget, shared
   * equally with sessions forked from this one (the last interaction can always be undone); 0: 1
   * GiB.
   */
  size_t undo_bytes;
} prism_session_options;

/**
 * Called as work proceeds: `done` runs from 0 to 1, `stage` names the completed stage and is valid
 * during the call. Returning 0 cancels the current call with PRISM_CANCELLED and leaves the
 * session unchanged. It runs on the thread of that call, must not throw or jump out, and gets
 * PRISM_BUSY from this session's other functions.
 */
typedef int32_t (*prism_progress_callback)(void *user, double done, const char *stage);

/**
 * The prompts of one interaction. Zero all of it, set struct_size, then the fields that are used.
 * The arrays are not used any more when the call returns.
 */
typedef struct {
  /**
   * sizeof(prism_prompts).
   */
  size_t struct_size;
  /**
   * A prism_space, for points, box, lines and lasso.
   */
  int32_t space;
  /**
   * point_count times three coordinates.
   */
  const double *points;
  /**
   * point_count numbers, 0 off the object and 1 on it; NULL: all on it.
   */
  const uint8_t *point_labels;
  /**
   * Number of points.
   */
  size_t point_count;
  /**
   * NULL, or six numbers: i0, j0, k0, i1, j1, k1, ends exclusive, or two corners in mm. It stays
   * in force until another is given.
   */
  const double *bounds;
  /**
   * scribble_count times the three indices of a voxel.
   */
  const int32_t *scribble;
  /**
   * scribble_count numbers, 0 off the object and 1 on it; NULL: all on it.
   */
  const uint8_t *scribble_labels;
  /**
   * Number of scribble voxels.
   */
  size_t scribble_count;
  /**
   * Voxel (0, 0, 0) of a mask or of logits on the volume's grid to start from, instead of the
   * session's last prediction; used if dense_kind says so.
   */
  const void *dense;
  /**
   * A prism_dense.
   */
  int32_t dense_kind;
  /**
   * Bytes from a voxel of it to the next along i, j and k; all 0: one behind the other, i
   * fastest.
   */
  ptrdiff_t dense_strides[3];
  /**
   * line_count times six coordinates: lines from border to border of the object, as in RECIST.
   */
  const double *lines;
  /**
   * Number of lines.
   */
  size_t line_count;
  /**
   * lasso_count times three coordinates: the corners of a closed outline around the object on
   * one slice, of any axis.
   */
  const double *lasso;
  /**
   * Number of corners: 0, or at least 3.
   */
  size_t lasso_count;
  /**
   * NULL, or a mask on the volume's grid, uint8, nonzero in other objects: the result never
   * enters them. It stays in force until another is given.
   */
  const uint8_t *others;
  /**
   * Bytes from a voxel of it to the next along i, j and k; all 0: one behind the other, i
   * fastest.
   */
  ptrdiff_t others_strides[3];
} prism_prompts;

/**
 * The patch of a session: the cube of the scan that the model saw last, or will see first. A
 * session that follows an object looks at several.
 */
typedef struct {
  /**
   * sizeof(prism_patch_info), set by the caller.
   */
  size_t struct_size;
  /**
   * Voxels along each side.
   */
  size_t edge;
  /**
   * Spacing of these voxels in mm.
   */
  double spacing;
  /**
   * Whether the spacing was made coarser than requested, so that the object fits.
   */
  int32_t coarsened;
  /**
   * Row-major matrix that maps patch voxel (i, j, k, 1) to millimetres in RAS.
   */
  double affine[16];
  /**
   * Bytes of all encoded patches that are kept.
   */
  size_t bytes;
} prism_patch_info;

/**
 * An array of voxels in the caller's memory, and its geometry. Voxel (i, j, k) is at data + i *
 * strides[0] + j * strides[1] + k * strides[2].
 */
typedef struct {
  /**
   * sizeof(prism_array).
   */
  size_t struct_size;
  /**
   * Voxel (0, 0, 0).
   */
  const void *data;
  /**
   * A prism_element.
   */
  int32_t element;
  /**
   * Voxels along i, j and k: 1 to 65536 each.
   */
  size_t size[3];
  /**
   * Bytes from a voxel to the next along i, j and k, of any sign; all 0: contiguous, i fastest,
   * as in a NIfTI file.
   */
  ptrdiff_t strides[3];
  /**
   * NULL, or 16 numbers: the row-major matrix that maps (i, j, k, 1) to millimetres in RAS (x to
   * the right, y to the front, z to the head). Without it the axes run along x, y and z.
   */
  const double *affine;
  /**
   * NULL, or the distances between voxels along i, j and k in mm, used without an affine;
   * without either, 1 mm.
   */
  const double *spacing;
} prism_array;

/**
 * Facts about a volume.
 */
typedef struct {
  /**
   * sizeof(prism_volume_info), set by the caller.
   */
  size_t struct_size;
  /**
   * Voxels along i, j and k.
   */
  size_t size[3];
  /**
   * Distances in mm between voxels along i, j and k.
   */
  double spacing[3];
  /**
   * Row-major matrix that maps (i, j, k, 1) to millimetres in RAS.
   */
  double affine[16];
  /**
   * The lowest and the highest value.
   */
  float range[2];
} prism_volume_info;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * The interface version of the library that was loaded: compare it with PRISM_ABI_VERSION.
 */
uint32_t prism_abi_version(void);

/**
 * The version of the program, for example "0.1.0". The text is the library's and stays.
 */
const char *prism_version(void);

/**
 * Opens a device. `device` is "cpu", or "cuda" or "cuda:N" for NVIDIA GPU number N (its driver and
 * NVRTC are loaded now; neither is needed for "cpu"). `options` may be NULL: a thread per
 * processor, float32. The environment variable PRISM_ISA (avx512, avx2, neon, portable) limits the
 * CPU's instruction set.
 *
 * Fails with PRISM_DEVICE if there is no such device, or it lacks what was asked for. On success
 * `*engine` is the caller's, to be freed with prism_engine_free.
 *
 * Required: `device` ends with a NUL; `options` is NULL or a structure of the size that it says; `engine`
 * can be written.
 */
prism_status prism_engine_open(const char *device, const prism_engine_options *options, prism_engine **engine);

/**
 * Writes a line about an engine, for example "cpu, 2 threads, avx512", NUL-terminated, to
 * `buffer`, which holds `capacity` bytes. `*needed`, unless `needed` is NULL, becomes the number
 * of bytes, including the NUL; if `buffer` is NULL, nothing else happens.
 *
 * Required: `buffer` is NULL or holds `capacity` bytes; `needed` is NULL or can be written.
 */
prism_status prism_engine_describe(const prism_engine *engine, char *buffer, size_t capacity, size_t *needed);

/**
 * Frees an engine. Models that were loaded for it keep what they need of it. NULL is allowed.
 */
prism_status prism_engine_free(prism_engine *engine);

/**
 * Loads a model file (.safetensors, as `prism train` and `prism convert` write it) for an engine.
 * Its contents are checked against the hash in it; if it carries none, the log is told. The file
 * stays open, and large matrices are read again when they are needed: if the file is replaced,
 * nothing changes; if it is overwritten or truncated, later calls return PRISM_FILE, and never a
 * wrong answer. Fails with PRISM_FILE if the file cannot be used, PRISM_OUT_OF_MEMORY if it does
 * not fit. On success `*model` is the caller's, to be freed with prism_model_free.
 *
 * Required: `path` ends with a NUL; `model` can be written.
 */
prism_status prism_model_load(const prism_engine *engine, const char *path, prism_model **model);

/**
 * Loads a model for an engine from `size` bytes in memory, the contents of a model file. They are
 * not needed any more when this returns. Fails with PRISM_FILE if they cannot be used,
 * PRISM_OUT_OF_MEMORY if the model does not fit. On success `*model` is the caller's, to be freed
 * with prism_model_free.
 *
 * Required: `data` holds `size` bytes; `model` can be written.
 */
prism_status prism_model_load_memory(const prism_engine *engine, const void *data, size_t size, prism_model **model);

/**
 * Fills `*info` in; set its struct_size first.
 *
 * Required: `info` is a structure of the size that it says.
 */
prism_status prism_model_get_info(const prism_model *model, prism_model_info *info);

/**
 * Does in advance what the first encoding and the first interaction do once (they allocate memory,
 * lay out weights, make recordings on a GPU), so that no user waits for it. Takes about as long as
 * one of each.
 */
prism_status prism_model_warm_up(const prism_model *model);

/**
 * Frees a model. Sessions that were opened with it can still be used. NULL is allowed.
 */
prism_status prism_model_free(prism_model *model);

/**
 * Sends all messages of the process to `callback`, passing `user` to it; NULL for none. Without a
 * callback messages are dropped: the library writes nothing to the standard streams.
 *
 * When this returns, no other thread is inside a callback that was set before, and none will enter
 * it. It waits for those that are: hold no lock that they take. Inside a callback, which cannot
 * wait, it returns PRISM_BUSY if another thread is inside a log callback, and nothing changes; a
 * log callback that sets another one, or none, still runs to its own end.
 *
 * Required: `user` must stay usable, from any thread, until another callback was set and, where a callback
 * of the log did that itself, until that has returned.
 */
prism_status prism_set_log(prism_log_callback callback, void *user);

/**
 * Fills `*info` in; set its struct_size first.
 *
 * Required: `info` is a structure of the size that it says.
 */
prism_status prism_prediction_get_info(const prism_prediction *prediction, prism_prediction_info *info);

/**
 * Writes the candidates' scores, the network's estimate of the Dice of each (not calibrated), to
 * `scores`, which holds `capacity` of them. `*needed`, unless `needed` is NULL, becomes their
 * number; if `scores` is NULL, nothing else happens.
 *
 * Required: `scores` is NULL or holds `capacity` floats; `needed` is NULL or can be written.
 */
prism_status prism_prediction_get_scores(const prism_prediction *prediction, float *scores, size_t capacity, size_t *needed);

/**
 * Writes the mask to `buffer`, which holds `capacity` bytes: one uint8 per voxel, 1 on the object
 * and 0 off it. `grid` is a prism_grid. Voxel (i, j, k) is at buffer + i * strides[0] + j *
 * strides[1] + k * strides[2]; strides are in bytes, none negative; NULL: contiguous, i fastest,
 * as in a NIfTI file. `*needed`, unless `needed` is NULL, becomes the number of bytes from the
 * first voxel to the end of the last; if `buffer` is NULL, nothing else happens.
 *
 * Required: `buffer` is NULL or holds `capacity` bytes; `strides` is NULL or three numbers; `needed` is NULL
 * or can be written.
 */
prism_status prism_prediction_get_mask(const prism_prediction *prediction,
                                       int32_t grid,
                                       uint8_t *buffer,
                                       size_t capacity,
                                       const ptrdiff_t *strides,
                                       size_t *needed);

/**
 * Writes the logits, one float32 per voxel, positive on the object, to `buffer`, which holds
 * `capacity` bytes; grid, strides and `*needed` are as for prism_prediction_get_mask. The
 * probability is 1 / (1 + exp(-logit)). On PRISM_GRID_VOLUME, voxels that were never predicted
 * hold PRISM_LOGIT_OUTSIDE.
 *
 * Required: As prism_prediction_get_mask.
 */
prism_status prism_prediction_get_logits(const prism_prediction *prediction,
                                         int32_t grid,
                                         float *buffer,
                                         size_t capacity,
                                         const ptrdiff_t *strides,
                                         size_t *needed);

/**
 * Writes the mask of candidate number `candidate`, from 0, before refinement, on the patch, to
 * `buffer`; strides and `*needed` are as for prism_prediction_get_mask.
 *
 * Required: As prism_prediction_get_mask.
 */
prism_status prism_prediction_get_candidate(const prism_prediction *prediction,
                                            size_t candidate,
                                            uint8_t *buffer,
                                            size_t capacity,
                                            const ptrdiff_t *strides,
                                            size_t *needed);

/**
 * Writes the mask on the volume's grid to a file whose extension selects the format: NIfTI
 * (.nii.gz, .nii) with the volume's affine, codes and units, NRRD (.nrrd; .seg.nrrd, a 3D Slicer
 * segmentation) or MetaImage (.mha; .mhd with its voxels in a .zraw file beside it); the same
 * bytes as `prism segment` writes. For a volume read from a DICOM series also a DICOM segmentation
 * (.dcm), which refers to its slices. The file appears complete or not at all. A file that the
 * volume was read from is not overwritten, by whatever name (a link, a hard link): that gives
 * PRISM_FILE, and nothing is written.
 *
 * Required: `path` ends with a NUL.
 */
prism_status prism_prediction_save_mask(const prism_prediction *prediction, const char *path);

/**
 * Frees a prediction. NULL is allowed.
 */
prism_status prism_prediction_free(prism_prediction *prediction);

/**
 * Opens a session on a volume, for one object. `options` may be NULL. The scan is not encoded yet:
 * prism_session_encode or the first interaction does it. On success the caller owns `*session` and
 * releases it with prism_session_free.
 *
 * Required: `options` is NULL or a structure of the size that it says; `session` can be written.
 */
prism_status prism_session_open(const prism_model *model, const prism_volume *volume, const prism_session_options *options, prism_session **session);

/**
 * Opens a session for another object on the scan that `session` has encoded, or will encode for
 * itself where it has not. Options and callbacks are the same.
 *
 * Required: `another` can be written.
 */
prism_status prism_session_fork(const prism_session *session, prism_session **another);

/**
 * Calls `callback` as later encodings and interactions of this session proceed, passing `user` to
 * it; NULL for none.
 *
 * Required: `user` must stay usable, from any thread that calls this session's functions, until another
 * callback was set or the session was freed.
 */
prism_status prism_session_set_progress(const prism_session *session, prism_progress_callback callback, void *user);

/**
 * Cancels the session's call that is running on another thread, at its next stage, with
 * PRISM_CANCELLED; without such a call nothing happens.
 */
prism_status prism_session_cancel(const prism_session *session);

/**
 * Encodes the patch that `prompts` would make the model look at (a box, else the points on the
 * object), so that the first interaction does not have to; give what is known before the user's
 * first click. It adds no prompts. A released session that was used before starts over: its
 * predictions and history are dropped.
 *
 * Required: `prompts` is a structure of the size that it says, its arrays hold what its counts say.
 */
prism_status prism_session_encode(const prism_session *session, const prism_prompts *prompts);

/**
 * One interaction: these prompts are added to the earlier ones. Encodes the scan first if needed.
 * On success `*prediction`, unless `prediction` is NULL, is the result; the caller owns it and
 * releases it with prism_prediction_free. On failure the session is unchanged.
 *
 * Required: `prompts` is a structure of the size that it says, its arrays hold what its counts say;
 * `prediction` is NULL or can be written.
 */
prism_status prism_session_interact(const prism_session *session, const prism_prompts *prompts, prism_prediction **prediction);

/**
 * Undoes the last interaction; PRISM_NOTHING if there is none.
 */
prism_status prism_session_undo(const prism_session *session);

/**
 * Restores the interaction that was undone last; PRISM_NOTHING if there is none.
 */
prism_status prism_session_redo(const prism_session *session);

/**
 * Removes prompts, predictions and history. Encoded patches are kept.
 */
prism_status prism_session_reset(const prism_session *session);

/**
 * Number of interactions that can be undone and redone. Either pointer may be NULL.
 *
 * Required: Each is NULL or can be written.
 */
prism_status prism_session_get_depth(const prism_session *session, size_t *undo, size_t *redo);

/**
 * The current prediction, also after undo and redo; PRISM_NOTHING if there is none. On success the
 * caller owns `*prediction` and releases it with prism_prediction_free.
 *
 * Required: `prediction` can be written.
 */
prism_status prism_session_get_prediction(const prism_session *session, prism_prediction **prediction);

/**
 * Fills in `*info` about the patch; set its struct_size first. PRISM_NOTHING before the scan is
 * encoded.
 *
 * Required: `info` is a structure of the size that it says.
 */
prism_status prism_session_get_patch(const prism_session *session, prism_patch_info *info);

/**
 * Frees a session. If another thread's call is using it, this waits for the end of that call
 * (which prism_session_cancel brings nearer): the arrays and callbacks of the session's callers
 * are not used any more when this returns. So hold no lock that a callback of that call takes. In
 * a callback, which cannot wait, this returns PRISM_BUSY, and the session stays. Predictions can
 * still be used. NULL is allowed.
 */
prism_status prism_session_free(prism_session *session);

/**
 * The message of the last failed call on this thread, naming the file, argument or voxel and what
 * was expected; "" if none failed. It is valid until the next failed call on this thread; do not
 * free it.
 */
const char *prism_last_error(void);

/**
 * The name of a status, for example "PRISM_BUSY"; "unknown status" for any other number. The text
 * is owned by the library and stays valid.
 */
const char *prism_status_name(int32_t status);

/**
 * Reads a scan: NIfTI-1 or -2 (.nii, .nii.gz, .hdr/.img), NRRD (.nrrd, .nhdr) or MetaImage (.mha,
 * .mhd), of any orientation; in a library built with the feature dicom also the only DICOM series
 * of a folder or zip archive, or that of one file. `which` selects one of several volumes, from 0;
 * -1 if there is only one. Warnings about the file go to the log. On success the caller owns
 * `*volume` and releases it with prism_volume_free.
 *
 * Required: `path` ends with a NUL; `volume` can be written.
 */
prism_status prism_volume_read(const char *path, int32_t which, prism_volume **volume);

/**
 * Wraps an array of the caller's as a scan. Nothing is copied: the array must stay valid and
 * unchanged until this volume and all sessions opened on it are freed; when the last of these
 * calls returns, nothing reads it any more, whatever other threads were doing. Predictions do not
 * need it. NaN and -inf are read as the lowest value, +inf as the highest, with a message in the
 * log; an array without any finite value is refused. On success the caller owns `*volume` and
 * releases it with prism_volume_free, which leaves the array alone.
 *
 * Required: `array` is a structure of the size that it says; all its voxels can be read for that long;
 * `volume` can be written.
 */
prism_status prism_volume_wrap(const prism_array *array, prism_volume **volume);

/**
 * Fills `*info` in; set its struct_size first.
 *
 * Required: `info` is a structure of the size that it says.
 */
prism_status prism_volume_get_info(const prism_volume *volume, prism_volume_info *info);

/**
 * Frees a volume. Sessions opened on it stay valid, and keep reading a wrapped array. If another
 * thread is inside a call on the volume itself, this waits for it; inside a callback it returns
 * PRISM_BUSY and the volume stays. NULL is allowed.
 */
prism_status prism_volume_free(prism_volume *volume);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* PRISM_H */
