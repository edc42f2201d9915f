// A C interface to llama.cpp's own speculative decoding (common/speculative.h), which has none; see draft_model.py.
//
// One speculator guesses for all sequences of a context. No exception leaves this file: a function returns false then,
// and the one that makes a speculator says why.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "common.h"
#include "log.h"
#include "speculative.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

struct Speculator {
    common_params_speculative params;
    common_speculative_ptr    speculative;
    common_batch              batch;
    llama_tokens              prompt;  // that guesses of these kinds do not look at
    std::vector<llama_tokens> guessed;
};

}  // namespace

// Guesses for `n_seq` sequences of `target`, computed with `draft`; `type` as in --spec-type. Null, and `error` (to be
// freed with arriero_free), when it cannot be.
EXPORT void * arriero_speculator(
    llama_context * target, llama_context * draft, const char * type, int32_t n_max, float p_min, uint32_t n_seq,
    char ** error) {
    std::string reason = "llama.cpp knows no such way to guess";
    common_log_set_verbosity_thold(-1);
    try {
        auto made = std::make_unique<Speculator>();
        made->params.types = { common_speculative_type_from_name(type) };
        made->params.draft.ctx_tgt = target;
        made->params.draft.ctx_dft = draft;
        made->params.draft.n_max = n_max;
        made->params.draft.p_min = p_min;
        made->params.draft.backend_sampling = false;
        made->speculative.reset(common_speculative_init(made->params, n_seq));
        made->batch = common_batch(draft);
        made->guessed.resize(n_seq);
        if (made->speculative) {
            *error = nullptr;
            return made.release();
        }
    } catch (const std::exception & caught) {
        reason = caught.what();
    } catch (...) {
        reason = "an unknown error";
    }
    *error = strdup(reason.c_str());
    return nullptr;
}

EXPORT void arriero_speculator_free(void * made) {
    delete static_cast<Speculator *>(made);
}

// The context that guesses reads `n` tokens, one micro-batch at most. False where that fails: what it holds of these
// sequences is not known then.
EXPORT bool arriero_speculator_read(
    void * made, const int32_t * tokens, const int32_t * positions, const int32_t * sequences, int32_t n) {
    try {
        auto & speculator = *static_cast<Speculator *>(made);
        speculator.batch.clear();
        for (int32_t i = 0; i < n; ++i) {
            speculator.batch.add(tokens[i], positions[i], sequences[i], false);
        }
        return common_speculative_process(speculator.speculative.get(), speculator.batch);
    } catch (...) {
        return false;
    }
}

// Guesses what follows `lasts[i]` at `positions[i]` of `sequences[i]`: `most[i]` tokens at most, written to
// guessed + i * stride; `counts[i]`: how many.
EXPORT bool arriero_speculator_guess(
    void * made, const int32_t * sequences, const int32_t * lasts, const int32_t * positions, const int32_t * most,
    int32_t n, int32_t * guessed, int32_t stride, int32_t * counts) {
    try {
        auto & speculator = *static_cast<Speculator *>(made);
        auto * speculative = speculator.speculative.get();
        for (int32_t i = 0; i < n; ++i) {
            auto & result = speculator.guessed.at(sequences[i]);
            result.clear();
            auto & asked = common_speculative_get_draft_params(speculative, sequences[i]);
            asked.drafting = true;
            asked.n_max = most[i];
            asked.pos0 = positions[i];
            asked.id_last = lasts[i];
            asked.prompt = &speculator.prompt;
            asked.result = &result;
        }
        common_speculative_draft(speculative);
        for (int32_t i = 0; i < n; ++i) {
            const auto & result = speculator.guessed.at(sequences[i]);
            counts[i] = std::min<int32_t>({ static_cast<int32_t>(result.size()), most[i], stride });
            std::copy_n(result.begin(), counts[i], guessed + static_cast<size_t>(i) * stride);
        }
        return true;
    } catch (...) {
        return false;
    }
}

// Of the last guesses for `sequence`, the first `n_right` were right.
EXPORT bool arriero_speculator_accept(void * made, int32_t sequence, int32_t n_right) {
    try {
        common_speculative_accept(
            static_cast<Speculator *>(made)->speculative.get(), sequence, static_cast<uint16_t>(n_right));
        return true;
    } catch (...) {
        return false;
    }
}
