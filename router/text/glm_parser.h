/* glm_parser.h: takes GLM-4.7's output apart: reasoning, content, tool calls.
 *
 *   turn := reasoning </think> content call*
 *   call := <tool_call> name ( <arg_key> k </arg_key> <arg_value> v </arg_value> )* </tool_call>
 *
 * The tags are tokens, and only tokens count: text that spells "</arg_value>" is text. One parser
 * serves streamed and whole answers: the events of a kind, concatenated, are the same however the
 * output was cut. The rules beyond the grammar are written above the states in glm_parser.c.
 */
#ifndef BATON_GLM_PARSER_H
#define BATON_GLM_PARSER_H

#include "router/text/detokenizer.h"

enum glm_tag {
    GLM_THINK,
    GLM_THINK_END,
    GLM_CALL,
    GLM_CALL_END_TAG,
    GLM_KEY,
    GLM_KEY_END,
    GLM_VALUE,
    GLM_VALUE_END,
    GLM_N_TAGS
};

enum glm_event_kind {
    GLM_EVENT_REASONING,  /* text */
    GLM_EVENT_CONTENT,    /* text */
    GLM_EVENT_CALL_START, /* text is the function's name */
    GLM_EVENT_ARGUMENTS,  /* text is a piece of the JSON object, cut anywhere between characters */
    GLM_EVENT_CALL_END,   /* no text */
};

/* Pointers are valid during the call. text is UTF-8 and, but for CALL_END, never empty. */
struct glm_event {
    enum glm_event_kind kind;
    uint32_t call_idx; /* of call events: 0, 1, .. in order of appearance */
    const char *id;    /* of CALL_START: "call_" and 24 hex digits */
    const char *text;
    size_t n_text;
};
typedef void glm_event_fn(void *user, const struct glm_event *e);

struct glm_options {
    const struct tokenizer *tokenizer;
    bool skip_special;   /* as the text was made */
    bool reasoning;      /* the output begins inside reasoning */
    bool calls;          /* take tool calls apart; false: their tags are text */
    const json_t *tools; /* OpenAI's array, for the types of arguments; borrowed, may be NULL */
    uint64_t id_seed;    /* ids of calls follow from it */
};

struct glm_mark; /* a tag among the ids whose text has not come yet */

struct glm_parser {
    struct glm_options options;
    glm_event_fn *fn;
    void *user;
    int32_t tag_ids[GLM_N_TAGS];

    /* Where the tags are in the text. */
    struct detokenizer detok;
    struct json_out scratch;
    uint64_t n_bytes; /* of text that all ids have */
    uint64_t n_text;  /* of text seen */
    struct glm_mark *marks;
    size_t first_mark, n_marks, cap_marks;
    uint32_t in_tag;   /* bytes seen of the first mark's text */
    bool thinking_ids; /* no id has ended reasoning yet */

    int state, origin; /* origin: what the call interrupted */
    bool skip_newlines, reasoning_begun, think_end_due;

    /* The call that is open. */
    struct json_out held; /* text not decided about */
    size_t n_held_tag;    /* bytes of <tool_call> at its start */
    struct json_out key, value, arguments;
    const json_t *schema;
    uint64_t *keys; /* hashes of those seen */
    size_t n_keys, cap_keys;
    uint32_t n_pairs;
    unsigned types;
    int value_mode;

    /* For the caller to read. */
    uint32_t n_reasoning; /* tokens up to the one that ended reasoning */
    uint32_t n_calls;
    bool broken; /* the output ended inside a call's arguments */
    bool failed; /* out of memory: events are missing */
};

/* Allocates nothing yet. fn is called from within push and end only. */
void glm_parser_init(struct glm_parser *p, const struct glm_options *options, glm_event_fn *fn,
                     void *user);
void glm_parser_finish(struct glm_parser *p);

/* New ids and new text. The text is that of all ids since the start, and may come later than the
 * ids (held back for stop strings), or never (cut by one); never before them. */
void glm_parser_push(struct glm_parser *p, const int32_t *ids, size_t n_ids, const char *text,
                     size_t n_text);

/* The output is over; releases what was held. A call whose name is not certain becomes text again,
 * as it was written. One that has begun stays a call: if its last pair is complete and the model
 * stopped of itself (stopped), only </tool_call> is missing and it counts as complete; else its
 * arguments end where the output did, as unfinished JSON (so that no half command is run), and
 * p->broken is set: finish_reason is then "length". */
void glm_parser_end(struct glm_parser *p, bool stopped);

#endif
