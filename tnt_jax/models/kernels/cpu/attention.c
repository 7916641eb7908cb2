/* Multi-head attention on a CPU, softmax(q k^T / sqrt(head_dim)) v, forward and gradient: arrays in float32 or bfloat16,
   arithmetic in float32. attention.py calls this; the equations are those of Attention in ../layers.py.

   Queries are taken in blocks. Where weights are made, a lane is a query, so that softmax is arithmetic between vectors;
   where weights are used, a lane is a channel, and they are broadcast from where they lie. Nothing is transposed but the
   queries, and no more weights are kept than a block has. */

#include <string.h>

#include "xla_call.h"

enum { BLOCK = HIGH * LANES }; /* queries */

typedef struct {
    size images, tokens, dim, heads, head_dim;
    size vectors;       /* of the channels of a head */
    Array qkv;          /* (images, tokens, 3 dim) */
    Array cotangent;    /* (images, tokens, dim), what reaches the result; without data, no gradient is wanted */
    Array out;          /* the result, (images, tokens, dim), or what reaches qkv */
} Work;

/* Arrays of a head. Those of queries have a block of them. */
typedef struct {
    vec *query_lanes, *cotangent_lanes;               /* (head_dim, HIGH), lanes are queries */
    vec *weights, *of_weights;                    /* (tokens, HIGH), lanes are queries */
    vec *query, *cotangent, *of_query, *attended;     /* (BLOCK, vectors), lanes are channels */
    vec *key, *value, *of_key, *of_value;         /* (tokens, vectors), lanes are channels */
} Head;

static size lay_out(const Work *work, Head *head, vec *memory) {
    size lanes = work->head_dim * HIGH, pairs = work->tokens * HIGH, block = BLOCK * work->vectors;
    size all = work->tokens * work->vectors, count = 0;
    struct {
        vec **array;
        size count;
    } arrays[] = {{&head->query_lanes, lanes}, {&head->cotangent_lanes, lanes}, {&head->weights, pairs},
                  {&head->of_weights, pairs}, {&head->query, block}, {&head->cotangent, block},
                  {&head->of_query, block}, {&head->attended, block}, {&head->key, all},
                  {&head->value, all}, {&head->of_key, all}, {&head->of_value, all}};
    for (size i = 0; i < (size)(sizeof arrays / sizeof *arrays); count += arrays[i++].count)
        if (memory) *arrays[i].array = memory + count;
    return count;
}

/* Rows of `channels` numbers to vectors, the last filled up with zeros. */
static void load_rows(Array rows, size stride, size count, size channels, size vectors, vec *to) {
    for (size row = 0; row < count; row++, to += vectors) {
        to[vectors - 1] = all(0);
        read_numbers(from(rows, row * stride), channels, (float *)to, 1);
    }
}

static void store_rows(const vec *rows, size vectors, size count, size channels, Array to, size stride) {
    for (size row = 0; row < count; row++, rows += vectors)
        write_numbers((const float *)rows, 1, channels, from(to, row * stride));
}

/* Rows of a block transposed, so that they are lanes; those that the block does not have are zeros. */
static void load_lanes(const vec *rows, size vectors, size count, size channels, vec *to) {
    float *lanes = (float *)to;
    memset(lanes, 0, channels * HIGH * sizeof(vec));
    for (size row = 0; row < count; row++)
        for (size i = 0; i < channels; i++) lanes[i * BLOCK + row] = ((const float *)(rows + row * vectors))[i];
}

/* out (tiles of queries, tokens) = queries (tiles, head_dim) times rows (tokens, head_dim) transposed. */
INLINE void query_products(const Work *work, size tiles, vec *lanes, const vec *rows, vec *out) {
    Numbers columns = {(const float *)rows, 1, work->vectors * LANES};
    linear(tiles, work->head_dim, work->tokens, (Vectors){lanes, 1, HIGH}, columns, (Vectors){out, 1, HIGH}, 0);
}

static void softmax(const Work *work, size tiles, vec *weights) {
    float scale = 1 / sqrtf((float)work->head_dim);
    for (size tile = 0; tile < tiles; tile++) {
        vec *first = weights + tile, *end = first + work->tokens * HIGH, most = *first, sum = {0};
        for (vec *x = first; x < end; x += HIGH) most = larger(most, *x);
        for (vec *x = first; x < end; x += HIGH) sum += *x = exponential((*x - most) * scale);
        sum = 1 / sum;
        for (vec *x = first; x < end; x += HIGH) *x *= sum;
    }
}

static void softmax_gradient(const Work *work, size tiles, const vec *weights, vec *cotangent) {
    float scale = 1 / sqrtf((float)work->head_dim);
    for (size tile = 0; tile < tiles; tile++) {
        size end = work->tokens * HIGH;
        vec sum = {0};
        for (size i = tile; i < end; i += HIGH) sum += weights[i] * cotangent[i];
        for (size i = tile; i < end; i += HIGH) cotangent[i] = weights[i] * (cotangent[i] - sum) * scale;
    }
}

/* out (queries, channels) = weights (tokens, queries) transposed, times rows (tokens, channels). */
INLINE void sum_over_tokens(const Work *work, size queries, const vec *weights, vec *rows, vec *out) {
    linear(work->vectors, work->tokens, queries, (Vectors){rows, 1, work->vectors},
           (Numbers){(const float *)weights, BLOCK, 1}, (Vectors){out, 1, work->vectors}, 0);
}

/* out (tokens, channels) += weights (tokens, queries) times rows (queries, channels). */
INLINE void add_over_queries(const Work *work, size queries, const vec *weights, vec *rows, vec *out) {
    linear(work->vectors, queries, work->tokens, (Vectors){rows, 1, work->vectors},
           (Numbers){(const float *)weights, 1, BLOCK}, (Vectors){out, 1, work->vectors}, 1);
}

static void forward(const Work *work, const Head *head, Array qkv, Array out) {
    size dim = work->dim, stride = 3 * dim, tokens = work->tokens, channels = work->head_dim, vectors = work->vectors;
    load_rows(from(qkv, dim), stride, tokens, channels, vectors, head->key);
    load_rows(from(qkv, 2 * dim), stride, tokens, channels, vectors, head->value);
    for (size first = 0; first < tokens; first += BLOCK) {
        size queries = tokens - first < BLOCK ? tokens - first : BLOCK, tiles = (queries + LANES - 1) / LANES;
        load_rows(from(qkv, first * stride), stride, queries, channels, vectors, head->query);
        load_lanes(head->query, vectors, queries, channels, head->query_lanes);
        query_products(work, tiles, head->query_lanes, head->key, head->weights);
        softmax(work, tiles, head->weights);
        sum_over_tokens(work, queries, head->weights, head->value, head->attended);
        store_rows(head->attended, vectors, queries, channels, from(out, first * dim), dim);
    }
}

static void backward(const Work *work, const Head *head, Array qkv, Array cotangent, Array of_qkv) {
    size dim = work->dim, stride = 3 * dim, tokens = work->tokens, channels = work->head_dim, vectors = work->vectors;
    load_rows(from(qkv, dim), stride, tokens, channels, vectors, head->key);
    load_rows(from(qkv, 2 * dim), stride, tokens, channels, vectors, head->value);
    memset(head->of_key, 0, tokens * vectors * sizeof(vec));
    memset(head->of_value, 0, tokens * vectors * sizeof(vec));
    for (size first = 0; first < tokens; first += BLOCK) {
        size queries = tokens - first < BLOCK ? tokens - first : BLOCK, tiles = (queries + LANES - 1) / LANES;
        load_rows(from(qkv, first * stride), stride, queries, channels, vectors, head->query);
        load_lanes(head->query, vectors, queries, channels, head->query_lanes);
        load_rows(from(cotangent, first * dim), dim, queries, channels, vectors, head->cotangent);
        load_lanes(head->cotangent, vectors, queries, channels, head->cotangent_lanes);

        query_products(work, tiles, head->query_lanes, head->key, head->weights);
        softmax(work, tiles, head->weights);
        query_products(work, tiles, head->cotangent_lanes, head->value, head->of_weights);
        add_over_queries(work, queries, head->weights, head->cotangent, head->of_value);
        softmax_gradient(work, tiles, head->weights, head->of_weights);
        add_over_queries(work, queries, head->of_weights, head->query, head->of_key);
        sum_over_tokens(work, queries, head->of_weights, head->key, head->of_query);
        store_rows(head->of_query, vectors, queries, channels, from(of_qkv, first * stride), stride);
    }
    store_rows(head->of_key, vectors, tokens, channels, from(of_qkv, dim), stride);
    store_rows(head->of_value, vectors, tokens, channels, from(of_qkv, 2 * dim), stride);
}

/* One head of one image. */
static int do_head(void *data, size chunk) {
    const Work *work = data;
    Head head;
    vec *memory = scratch(lay_out(work, &head, NULL));
    if (!memory) return 0;
    lay_out(work, &head, memory);
    size first = chunk / work->heads * work->tokens * work->dim, channel = chunk % work->heads * work->head_dim;
    Array qkv = from(work->qkv, 3 * first + channel);
    if (work->cotangent.data)
        backward(work, &head, qkv, from(work->cotangent, first + channel), from(work->out, 3 * first + channel));
    else
        forward(work, &head, qkv, from(work->out, first + channel));
    return 1;
}

static XLA_FFI_Error *attend(XLA_FFI_CallFrame *call, int gradient) {
    if (is_question_of_version(call, 0)) return NULL;
    const XLA_FFI_Buffer *qkv = argument(call, 0);
    Work work = {.images = qkv->dims[0], .tokens = qkv->dims[1], .dim = qkv->dims[2] / 3, .qkv = array_of(qkv)};
    work.heads = *(const int64_t *)((const XLA_FFI_Scalar *)call->attrs.attrs[0])->value;
    work.head_dim = work.dim / work.heads;
    work.vectors = (work.head_dim + LANES - 1) / LANES;
    if (gradient) work.cotangent = array_of(argument(call, 1));
    work.out = array_of(result(call, 0));
    return do_all(call, do_head, &work, work.images * work.heads);
}

/* Argument: qkv. Attribute: heads. */
XLA_FFI_Error *attention_forward(XLA_FFI_CallFrame *call) { return attend(call, 0); }

/* Arguments: qkv, and what reaches the result. */
XLA_FFI_Error *attention_gradient(XLA_FFI_CallFrame *call) { return attend(call, 1); }
