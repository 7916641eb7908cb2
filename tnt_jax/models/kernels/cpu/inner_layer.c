/* The inner transformer layer on a CPU, forward and gradient: words in float32 or bfloat16, arithmetic and parameters in
   float32. inner_layer.py calls this; the equations are those of `TransformerLayer` in ../../layers.py.

   A sentence is a lane: a vector holds one channel of one word of LANES sentences. All of the layer is then arithmetic
   between vectors and broadcast weights, and no loop is as short as a head of 6 channels. A tile of LANES sentences
   stays in the cache from the words that come in to the words that go out. */

#include <string.h>

#include "xla_call.h"

/* The parameters, in the order in which they come. */
enum { NORM1_SCALE, NORM1_BIAS, QKV, PROJ, PROJ_BIAS, NORM2_SCALE, NORM2_BIAS, FC1, FC1_BIAS, FC2, FC2_BIAS, PARAMETERS };

typedef struct {
    size sentences, words, channels, heads, hidden;
    size normed;   /* channels that a norm looks at: of one word, or of all words of a patch */
    float epsilon;
    Array words_in, cotangent, words_out; /* cotangent: of what the layer returns; without data, no gradient is wanted */
    const float *survival, *parameters[PARAMETERS];
    size sizes[PARAMETERS], all_parameters; /* numbers in each parameter, and in all */
    float *partial;                         /* gradients of the parameters by chunk, one after the other */
    size chunk_tiles;
} Layer;

INLINE Numbers matrix(const Layer *layer, int which, size columns) {
    return (Numbers){layer->parameters[which], columns, 1};
}

/* Words of sentences `first` to `first + LANES` to vectors; those beyond the last are 0. */
static void load_tile(Array words, size first, size sentences, size numbers, vec *to) {
    float *lanes = (float *)to;
    for (size lane = 0; lane < LANES; lane++) {
        if (first + lane < sentences)
            read_numbers(from(words, (first + lane) * numbers), numbers, lanes + lane, LANES);
        else
            for (size i = 0; i < numbers; i++) lanes[i * LANES + lane] = 0;
    }
}

static void store_tile(const vec *tile, size first, size sentences, size numbers, Array words) {
    const float *lanes = (const float *)tile;
    for (size lane = 0; lane < LANES && first + lane < sentences; lane++)
        write_numbers(lanes + lane, LANES, numbers, from(words, (first + lane) * numbers));
}

INLINE vec load_survival(const Layer *layer, int branch, size first) {
    vec x = {0};
    for (size lane = 0; lane < LANES && first + lane < layer->sentences; lane++)
        x[lane] = layer->survival[branch * layer->sentences + first + lane];
    return x;
}

/* normed = (x - mean) / deviation, out = normed * scale + bias, and the inverse deviations. */
static void norm(const Layer *layer, int scale_at, const vec *x, vec *normed, vec *out, vec *inverse) {
    size n = layer->normed, groups = layer->words * layer->channels / n;
    const float *scale = layer->parameters[scale_at], *bias = layer->parameters[scale_at + 1];
    for (size group = 0; group < groups; group++, x += n, normed += n, out += n) {
        vec mean = {0}, square = {0};
        for (size i = 0; i < n; i++) mean += x[i];
        mean /= (float)n;
        for (size i = 0; i < n; i++) square += (x[i] - mean) * (x[i] - mean);
        inverse[group] = inverse_root(square / (float)n + layer->epsilon);
        for (size i = 0; i < n; i++) {
            normed[i] = (x[i] - mean) * inverse[group];
            out[i] = normed[i] * scale[i] + bias[i];
        }
    }
}

/* cotangent += what reaches x through a norm; of_scale and of_bias += what reaches the parameters. */
static void norm_gradient(const Layer *layer, int scale_at, const vec *normed, const vec *inverse, const vec *of_out,
                          vec *cotangent, vec *of_scale, vec *of_bias) {
    size n = layer->normed, groups = layer->words * layer->channels / n;
    const float *scale = layer->parameters[scale_at];
    for (size group = 0; group < groups; group++, normed += n, of_out += n, cotangent += n) {
        vec mean = {0}, along = {0};
        for (size i = 0; i < n; i++) {
            vec scaled = of_out[i] * scale[i];
            mean += scaled;
            along += scaled * normed[i];
            of_scale[i] += of_out[i] * normed[i];
            of_bias[i] += of_out[i];
        }
        mean /= (float)n;
        along /= (float)n;
        for (size i = 0; i < n; i++)
            cotangent[i] += (of_out[i] * scale[i] - mean - normed[i] * along) * inverse[group];
    }
}

/* What a tile computes on the way, of which the gradient needs everything. */
typedef struct {
    vec *x, *normed1, *n1, *inverse1, *qkv, *weights, *attended, *x1, *normed2, *n2, *inverse2, *hidden;
    vec *derivative; /* of GELU */
    vec *of_x, *of_words, *of_hidden, *of_attended, *of_qkv, *of_weights, *of_parameters;
} Tile;

/* Lays the arrays of a tile out from `memory` on. Returns how many vectors they have. */
static size lay_out(const Layer *layer, Tile *tile, vec *memory) {
    size words = layer->words, flat = words * layer->channels, hidden = words * layer->hidden, count = 0;
    struct {
        vec **array;
        size count;
    } arrays[] = {{&tile->x, flat}, {&tile->normed1, flat}, {&tile->n1, flat}, {&tile->inverse1, words},
                  {&tile->qkv, 3 * flat}, {&tile->weights, layer->heads * words * words}, {&tile->attended, flat},
                  {&tile->x1, flat}, {&tile->normed2, flat}, {&tile->n2, flat}, {&tile->inverse2, words},
                  {&tile->hidden, hidden}, {&tile->derivative, hidden}, {&tile->of_x, flat}, {&tile->of_words, flat},
                  {&tile->of_hidden, hidden}, {&tile->of_attended, flat}, {&tile->of_qkv, 3 * flat},
                  {&tile->of_weights, words * words}, {&tile->of_parameters, layer->all_parameters}};
    for (size i = 0; i < (size)(sizeof arrays / sizeof *arrays); count += arrays[i++].count)
        if (memory) *arrays[i].array = memory + count;
    return count;
}

static void attention(const Layer *layer, const Tile *tile) {
    size words = layer->words, channels = layer->channels, size_of_head = channels / layer->heads;
    float scale = 1 / sqrtf((float)size_of_head);
    for (size head = 0; head < layer->heads; head++) {
        vec *start = tile->qkv + head * size_of_head, *weights = tile->weights + head * words * words;
        Vectors query = rows_of(start, 3 * channels), key = rows_of(start + channels, 3 * channels);
        Vectors value = rows_of(start + 2 * channels, 3 * channels);
        product(words, size_of_head, words, query, transposed(key), rows_of(weights, words), 0);
        for (vec *row = weights; row < weights + words * words; row += words) {
            vec most = row[0], sum = {0};
            for (size k = 1; k < words; k++) most = larger(most, row[k]);
            for (size k = 0; k < words; k++) sum += row[k] = exponential((row[k] - most) * scale);
            sum = 1 / sum;
            for (size k = 0; k < words; k++) row[k] *= sum;
        }
        Vectors out = rows_of(tile->attended + head * size_of_head, channels);
        product(words, words, size_of_head, rows_of(weights, words), value, out, 0);
    }
}

/* branch = x + survival (branch + bias) */
static void add_branch(const Layer *layer, int bias_at, const vec *x, vec survival, vec *branch) {
    const float *bias = layer->parameters[bias_at];
    for (const vec *end = x + layer->words * layer->channels; x < end;)
        for (size i = 0; i < layer->channels; i++, x++, branch++) *branch = *x + (*branch + bias[i]) * survival;
}

/* Of the hidden channels of a word, which begin at `first`; the derivative where it is wanted. */
static void gelu(const Layer *layer, const Tile *tile, size first, int gradient) {
    vec *hidden = tile->hidden + first, *derivative = tile->derivative + first;
    for (size i = 0; i < layer->hidden; i++) {
        vec h = hidden[i] + layer->parameters[FC1_BIAS][i], below = cumulative(h);
        hidden[i] = h * below;
        if (gradient) derivative[i] = below + h * 0.398942280f * exponential(h * h * -0.5f);
    }
}

/* x1 = x + survival (attention(norm(x)) W + b), x2 = x1 + survival (gelu(norm(x1) W + b) W + b); x2 goes to `out`. */
static void forward(const Layer *layer, const Tile *tile, size first, vec *out, int gradient) {
    size words = layer->words, channels = layer->channels, hidden = layer->hidden, numbers = words * channels;
    vec survival1 = load_survival(layer, 0, first), survival2 = load_survival(layer, 1, first);
    load_tile(layer->words_in, first, layer->sentences, numbers, tile->x);
    norm(layer, NORM1_SCALE, tile->x, tile->normed1, tile->n1, tile->inverse1);
    linear(words, channels, 3 * channels, rows_of(tile->n1, channels), matrix(layer, QKV, 3 * channels),
           rows_of(tile->qkv, 3 * channels), 0);
    attention(layer, tile);
    linear(words, channels, channels, rows_of(tile->attended, channels), matrix(layer, PROJ, channels),
           rows_of(tile->x1, channels), 0);
    add_branch(layer, PROJ_BIAS, tile->x, survival1, tile->x1);
    norm(layer, NORM2_SCALE, tile->x1, tile->normed2, tile->n2, tile->inverse2);
    linear(words, channels, hidden, rows_of(tile->n2, channels), matrix(layer, FC1, hidden),
           rows_of(tile->hidden, hidden), 0);
    for (size word = 0; word < words; word++) gelu(layer, tile, word * hidden, gradient);
    linear(words, hidden, channels, rows_of(tile->hidden, hidden), matrix(layer, FC2, channels),
           rows_of(out, channels), 0);
    add_branch(layer, FC2_BIAS, tile->x1, survival2, out);
}

/* of_bias += sums over the words of what reaches it. */
static void add_bias_gradient(const vec *cotangent, size words, size channels, vec *of_bias) {
    for (const vec *end = cotangent + words * channels; cotangent < end;)
        for (size i = 0; i < channels; i++) of_bias[i] += *cotangent++;
}

static void attention_gradient(const Layer *layer, const Tile *tile) {
    size words = layer->words, channels = layer->channels, size_of_head = channels / layer->heads;
    float scale = 1 / sqrtf((float)size_of_head);
    for (size head = 0; head < layer->heads; head++) {
        size at = head * size_of_head;
        Vectors query = rows_of(tile->qkv + at, 3 * channels), of_query = rows_of(tile->of_qkv + at, 3 * channels);
        Vectors key = query, value = query, of_key = of_query, of_value = of_query;
        key.data += channels, value.data += 2 * channels, of_key.data += channels, of_value.data += 2 * channels;
        Vectors weights = rows_of(tile->weights + head * words * words, words);
        Vectors of_weights = rows_of(tile->of_weights, words), cotangent = rows_of(tile->of_attended + at, channels);
        product(words, words, size_of_head, transposed(weights), cotangent, of_value, 0);
        product(words, size_of_head, words, cotangent, transposed(value), of_weights, 0);
        for (size row = 0; row < words * words; row += words) {
            vec sum = {0};
            for (size k = row; k < row + words; k++) sum += of_weights.data[k] * weights.data[k];
            for (size k = row; k < row + words; k++)
                of_weights.data[k] = weights.data[k] * (of_weights.data[k] - sum) * scale;
        }
        product(words, words, size_of_head, of_weights, key, of_query, 0);
        product(words, words, size_of_head, transposed(of_weights), query, of_key, 0);
    }
}

/* From what reaches the words that the layer returned to what reaches those that it was given, by way of `forward`. */
static void backward(const Layer *layer, const Tile *tile, size first, Array of_words_in) {
    size words = layer->words, channels = layer->channels, hidden = layer->hidden, numbers = words * channels;
    vec survival1 = load_survival(layer, 0, first), survival2 = load_survival(layer, 1, first);
    vec *of[PARAMETERS], *at = tile->of_parameters;
    for (int i = 0; i < PARAMETERS; at += layer->sizes[i++]) of[i] = at;
    Vectors of_words = rows_of(tile->of_words, channels), of_hidden = rows_of(tile->of_hidden, hidden);
    Vectors of_qkv = rows_of(tile->of_qkv, 3 * channels);

    forward(layer, tile, first, tile->of_words, 1);
    load_tile(layer->cotangent, first, layer->sentences, numbers, tile->of_x);
    for (size i = 0; i < numbers; i++) tile->of_words[i] = tile->of_x[i] * survival2;
    add_bias_gradient(tile->of_words, words, channels, of[FC2_BIAS]);
    product(hidden, words, channels, transposed(rows_of(tile->hidden, hidden)), of_words, rows_of(of[FC2], channels), 1);
    linear(words, channels, hidden, of_words, transposed_numbers(matrix(layer, FC2, channels)), of_hidden, 0);
    for (size i = 0; i < words * hidden; i++) tile->of_hidden[i] *= tile->derivative[i];
    add_bias_gradient(tile->of_hidden, words, hidden, of[FC1_BIAS]);
    product(channels, words, hidden, transposed(rows_of(tile->n2, channels)), of_hidden, rows_of(of[FC1], hidden), 1);
    linear(words, hidden, channels, of_hidden, transposed_numbers(matrix(layer, FC1, hidden)), of_words, 0);
    norm_gradient(layer, NORM2_SCALE, tile->normed2, tile->inverse2, tile->of_words, tile->of_x, of[NORM2_SCALE],
                  of[NORM2_BIAS]);

    for (size i = 0; i < numbers; i++) tile->of_words[i] = tile->of_x[i] * survival1;
    add_bias_gradient(tile->of_words, words, channels, of[PROJ_BIAS]);
    product(channels, words, channels, transposed(rows_of(tile->attended, channels)), of_words,
            rows_of(of[PROJ], channels), 1);
    linear(words, channels, channels, of_words, transposed_numbers(matrix(layer, PROJ, channels)),
           rows_of(tile->of_attended, channels), 0);
    attention_gradient(layer, tile);
    product(channels, words, 3 * channels, transposed(rows_of(tile->n1, channels)), of_qkv,
            rows_of(of[QKV], 3 * channels), 1);
    linear(words, 3 * channels, channels, of_qkv, transposed_numbers(matrix(layer, QKV, 3 * channels)), of_words, 0);
    norm_gradient(layer, NORM1_SCALE, tile->normed1, tile->inverse1, tile->of_words, tile->of_x, of[NORM1_SCALE],
                  of[NORM1_BIAS]);
    store_tile(tile->of_x, first, layer->sentences, numbers, of_words_in);
}

static int do_chunk(void *work, size chunk) {
    const Layer *layer = work;
    Tile tile;
    int gradient = layer->cotangent.data != NULL;
    vec *memory = scratch(lay_out(layer, &tile, NULL));
    if (!memory) return 0;
    lay_out(layer, &tile, memory);
    size begin = chunk * layer->chunk_tiles * LANES, end = begin + layer->chunk_tiles * LANES;
    if (end > layer->sentences) end = layer->sentences;
    if (gradient) memset(tile.of_parameters, 0, layer->all_parameters * sizeof(vec));
    for (size first = begin; first < end; first += LANES) {
        if (gradient) {
            backward(layer, &tile, first, layer->words_out);
        } else {
            forward(layer, &tile, first, tile.n1, 0);
            store_tile(tile.n1, first, layer->sentences, layer->words * layer->channels, layer->words_out);
        }
    }
    for (size i = 0; gradient && i < layer->all_parameters; i++)
        layer->partial[chunk * layer->all_parameters + i] = sum_of_lanes(tile.of_parameters[i]);
    return 1;
}

/* Arguments: words (sentences, words, channels), survival (2, sentences), the parameters. Attributes, in the order of
   their names: epsilon, heads. */
static Layer read(const XLA_FFI_CallFrame *call) {
    const XLA_FFI_Buffer *words = argument(call, 0);
    Layer layer = {.sentences = words->dims[0], .words = words->dims[1], .channels = words->dims[2]};
    layer.epsilon = *(const float *)((const XLA_FFI_Scalar *)call->attrs.attrs[0])->value;
    layer.heads = *(const int64_t *)((const XLA_FFI_Scalar *)call->attrs.attrs[1])->value;
    layer.words_in = array_of(words);
    layer.survival = argument(call, 1)->data;
    for (int i = 0; i < PARAMETERS; i++) {
        const XLA_FFI_Buffer *parameter = argument(call, 2 + i);
        layer.parameters[i] = parameter->data;
        layer.sizes[i] = 1;
        for (int64_t axis = 0; axis < parameter->rank; axis++) layer.sizes[i] *= parameter->dims[axis];
        layer.all_parameters += layer.sizes[i];
    }
    layer.normed = layer.sizes[NORM1_SCALE];
    layer.hidden = layer.sizes[FC1_BIAS];
    layer.words_out = array_of(result(call, 0));
    layer.chunk_tiles = 1;
    return layer;
}

XLA_FFI_Error *inner_layer_forward(XLA_FFI_CallFrame *call) {
    if (is_question_of_version(call, 0)) return NULL;
    Layer layer = read(call);
    size tiles = (layer.sentences + LANES - 1) / LANES;
    return do_all(call, do_chunk, &layer, tiles);
}

/* As `inner_layer_forward`, with what reaches its result as one more argument; returns what reaches the words, and the
   parameters. Their sums are taken chunk by chunk, whichever thread has done them: they are the same every time. */
XLA_FFI_Error *inner_layer_gradient(XLA_FFI_CallFrame *call) {
    if (is_question_of_version(call, 0)) return NULL;
    Layer layer = read(call);
    layer.cotangent = array_of(argument(call, 2 + PARAMETERS));
    size tiles = (layer.sentences + LANES - 1) / LANES, few = tiles / 16;
    layer.chunk_tiles = few < 1 ? 1 : few < 8 ? few : 8;
    size chunks = (tiles + layer.chunk_tiles - 1) / layer.chunk_tiles;
    layer.partial = malloc(chunks * layer.all_parameters * sizeof(float));
    XLA_FFI_Error *error = layer.partial ? do_all(call, do_chunk, &layer, chunks) : no_memory(call);
    const float *partial = layer.partial;
    for (int i = 0; !error && i < PARAMETERS; partial += layer.sizes[i++]) {
        float *sum = result(call, 1 + i)->data;
        memset(sum, 0, layer.sizes[i] * sizeof(float));
        for (size chunk = 0; chunk < chunks; chunk++)
            for (size j = 0; j < layer.sizes[i]; j++) sum[j] += partial[chunk * layer.all_parameters + j];
    }
    free(layer.partial);
    return error;
}
