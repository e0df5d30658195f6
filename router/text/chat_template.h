/* chat_template.h: GLM-4.7-Flash's chat format, compiled in (no template language at run time).
 *
 * The result is a list of pieces: control pieces carry control tokens by name and template text,
 * user pieces carry what came from messages. User pieces are tokenised with added tokens off, so no
 * message text can become a control token, wherever it stands. Concatenated, the pieces are byte
 * for byte what the model's own template renders.
 */
#ifndef BATON_CHAT_TEMPLATE_H
#define BATON_CHAT_TEMPLATE_H

#include <jansson.h>

#include "router/text/tokenizer.h"

struct chat_options {
    bool add_generation_prompt; /* end with <|assistant|> and <think> or </think> */
    bool enable_thinking;       /* false: the generation prompt is </think> */
    bool clear_thinking; /* true (the default): drop reasoning before the last user message */
    bool continue_final_message; /* the last message is an assistant's and stays open */
};

struct chat_piece {
    size_t start, n; /* in text */
    bool control;    /* may contain added tokens */
};

struct chat_prompt {
    char *text;
    size_t n_text;
    struct chat_piece *pieces;
    size_t n_pieces;
};

/* messages: array of message objects as OpenAI clients send them, already validated to be objects
 * with a role. tools: array of tool objects as given, or NULL. Does what the model's template does,
 * but: content null counts as absent; `arguments` given as a JSON string is parsed ("" and missing
 * are {}); tool content given as a list of text parts is flattened; `reasoning` is taken for
 * reasoning_content; role developer is rendered as system; role function as tool.
 * ERR_INVALID names the message index and field: unknown role, arguments not an object, content of
 * an unsupported part type (images, audio). */
MUST_CHECK enum err chat_render(const json_t *messages, const json_t *tools,
                                const struct chat_options *options, struct chat_prompt *ret);
void chat_prompt_finish(struct chat_prompt *p);

/* Tokenises the pieces one by one. */
MUST_CHECK enum err chat_encode(const struct tokenizer *t, const struct chat_prompt *p,
                                struct ids *ids);

#endif
