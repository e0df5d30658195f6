/* chat_fuzz.c: any bytes as the body of a chat request, rendered and tokenised under all sixteen
 * options. The pieces must cover the text, and user pieces must hold no added token. */
#include "common/base/json.h"
#include "router/text/chat_template.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

static const struct tokenizer *demo_tokenizer(void)
{
    static struct tokenizer *t;
    if (!t) {
        const char *dir = getenv("BATON_DEMO_DIR");
        char path[4096];
        snprintf(path, sizeof(path), "%s/tokenizer.json", dir ? dir : "deploy/demo-model");
        if (tokenizer_load(path, &t) != ERR_OK) {
            fprintf(stderr, "%s\n", err_text(ERR_BAD_MODEL));
            exit(1);
        }
    }
    return t;
}

static void check_prompt(const struct tokenizer *t, const struct chat_prompt *p)
{
    struct ids ids = {0}, all = {0};
    size_t end = 0;
    for (size_t i = 0; i < p->n_pieces; i++) {
        const struct chat_piece *piece = &p->pieces[i];
        if (piece->start != end || piece->n == 0)
            abort();
        end += piece->n;
        ids.len = 0;
        if (tokenizer_encode(t, p->text + piece->start, piece->n, piece->control, &ids) != ERR_OK)
            abort();
        for (size_t k = 0; k < ids.len; k++)
            if (tokenizer_is_added(t, ids.data[k]) != piece->control)
                abort();
    }
    if (end != p->n_text || chat_encode(t, p, &all) != ERR_OK)
        abort();
    ids_finish(&ids);
    ids_finish(&all);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    const struct tokenizer *t = demo_tokenizer();
    json_auto_t *body = NULL;
    if (json_parse((const char *)data, n, &json_limits_request, &body) != ERR_OK)
        return 0;
    const json_t *messages = json_object_get(body, "messages");
    for (unsigned bits = 0; bits < 16; bits++) {
        const struct chat_options options = {.add_generation_prompt = bits & 1,
                                             .enable_thinking = bits & 2,
                                             .clear_thinking = bits & 4,
                                             .continue_final_message = bits & 8};
        struct chat_prompt p;
        if (chat_render(messages ? messages : body, json_object_get(body, "tools"), &options, &p) !=
            ERR_OK)
            continue;
        check_prompt(t, &p);
        chat_prompt_finish(&p);
    }
    return 0;
}
