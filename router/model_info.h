/* model_info.h: what the router needs to know of a checkpoint, read without the engine. */
#ifndef BATON_MODEL_INFO_H
#define BATON_MODEL_INFO_H

#include <stdint.h>

#include "common/base/err.h"

#define MODEL_INFO_MAX_EOS 8

struct model_info {
    char name[256]; // the directory's own name
    char tokenizer_path[4096];
    int32_t vocab;
    uint32_t max_positions;
    int32_t eos[MODEL_INFO_MAX_EOS];
    int n_eos;
    double temperature, top_p; // generation_config.json, else 1 and 1
    int top_k;                 // else 0, off
    uint64_t tokenizer_hash;   // as workers compute it for their fingerprint
};

/* Reads config.json, generation_config.json (if there) and tokenizer.json of dir. ERR_INVALID: dir
 * is empty or no directory; ERR_BAD_MODEL names file and field. */
MUST_CHECK enum err model_info_load(const char *dir, struct model_info *ret);

#endif
