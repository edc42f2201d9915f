// A C interface to what llama.cpp opens sound files with (miniaudio): libmtmd has none that needs no projector. Time is not
// limited here, and memory by the caller's buffer alone; see media_files.py.

#include <cstddef>
#include <cstdint>

#define MINIAUDIO_IMPLEMENTATION
#define MA_NO_DEVICE_IO
#define MA_NO_ENCODING
#define MA_NO_ENGINE
#define MA_NO_GENERATION
#define MA_NO_NODE_GRAPH
#define MA_NO_RESOURCE_MANAGER
#define MA_NO_THREADING
#define MA_NO_WAV
#define MA_API static
#include "miniaudio/miniaudio.h"

// The first samples of a file, at most `most`: one channel at `rate` Hz. Returns how many there are, or -1 for a file that
// is neither a FLAC nor an MP3.
extern "C" __attribute__((visibility("default")))
int64_t arriero_sound(
    const void * file, size_t n_bytes, bool is_flac, uint32_t rate, float * samples, size_t most
) {
    ma_decoder_config config = ma_decoder_config_init(ma_format_f32, 1, rate);
    config.encodingFormat = is_flac ? ma_encoding_format_flac : ma_encoding_format_mp3;
    ma_decoder decoder;
    if (ma_decoder_init_memory(file, n_bytes, &config, &decoder) != MA_SUCCESS) {
        return -1;
    }
    size_t count = 0;
    ma_result result = MA_SUCCESS;
    while (result == MA_SUCCESS && count < most) {
        ma_uint64 n_read = 0;
        result = ma_decoder_read_pcm_frames(&decoder, samples + count, most - count, &n_read);
        if (n_read == 0) {
            break;
        }
        count += static_cast<size_t>(n_read);
    }
    ma_decoder_uninit(&decoder);
    return static_cast<int64_t>(count);
}
