/* Calls the functions of a kernel as XLA does, with arrays of random shapes that end where their memory does.

   KERNEL is inner_layer.c, transpose.c or attention.c; INNER and TRANSPOSE are set for the first two. */

#include <pthread.h>
#include <stdio.h>

#include KERNEL

enum { MOST_ARRAYS = 20 };

static uint64_t state;

static uint32_t chance(uint32_t below) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 33) % below;
}

static XLA_FFI_Error *num_threads(XLA_FFI_ThreadPool_NumThreads_Args *args) {
    *args->num_threads = 3;
    return NULL;
}

typedef struct {
    XLA_FFI_Task *task;
    void *data;
} Task;

static void *run(void *given) {
    Task task = *(Task *)given;
    free(given);
    task.task(task.data);
    return NULL;
}

static pthread_t threads[MOST_ARRAYS];
static int started;

static XLA_FFI_Error *schedule(XLA_FFI_ThreadPool_Schedule_Args *args) {
    Task *task = malloc(sizeof *task);
    *task = (Task){args->task, args->data};
    if (pthread_create(&threads[started++], NULL, run, task)) abort();
    return NULL;
}

typedef struct {
    XLA_FFI_Buffer buffers[MOST_ARRAYS];
    int64_t dims[MOST_ARRAYS][4];
    void *pointers[MOST_ARRAYS];
    int count;
} Arrays;

static void add_typed(Arrays *arrays, XLA_FFI_DataType type, int rank, const int64_t *dims, int filled) {
    size_t numbers = 1;
    for (int axis = 0; axis < rank; axis++) numbers *= dims[axis];
    int is_bfloat16 = type == XLA_FFI_DataType_BF16;
    Array array = {malloc(numbers * (is_bfloat16 ? 2 : 4)), is_bfloat16};
    for (size_t i = 0; i < numbers && filled; i++) {
        float number = (float)chance(2001) / 1000 - 1;
        write_numbers(&number, 1, 1, from(array, i));
    }
    int at = arrays->count++;
    memcpy(arrays->dims[at], dims, rank * sizeof(int64_t));
    arrays->buffers[at] = (XLA_FFI_Buffer){.dtype = type, .data = array.data, .rank = rank, .dims = arrays->dims[at]};
    arrays->pointers[at] = &arrays->buffers[at];
}

static void add(Arrays *arrays, int rank, const int64_t *dims, int filled) {
    add_typed(arrays, XLA_FFI_DataType_F32, rank, dims, filled);
}

static void call(XLA_FFI_Handler *handler, Arrays *in, Arrays *out, void **attrs) {
    XLA_FFI_Api api = {0};
    api.XLA_FFI_ThreadPool_NumThreads = num_threads;
    api.XLA_FFI_ThreadPool_Schedule = schedule;
    XLA_FFI_CallFrame frame = {.api = &api};
    frame.args.args = in->pointers;
    frame.rets.rets = out->pointers;
    frame.attrs.attrs = attrs;
    started = 0;
    if (handler(&frame)) abort();
    while (started) pthread_join(threads[--started], NULL);
    for (int i = 0; i < in->count; i++) free(in->buffers[i].data);
    for (int i = 0; i < out->count; i++) free(out->buffers[i].data);
}

#define DIMS(...) (sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)), (int64_t[]){__VA_ARGS__}

#ifdef INNER
static void once(int gradient) {
    XLA_FFI_DataType type = chance(2) ? XLA_FFI_DataType_F32 : XLA_FFI_DataType_BF16;
    int64_t words = 1 + chance(16), heads = 1 + chance(4), channels = heads * (1 + chance(8)), hidden = 1 + chance(50);
    int64_t sentences = 1 + chance(70), normed = chance(2) ? channels : words * channels;
    float epsilon = 1e-5f;
    void *attrs[] = {&(XLA_FFI_Scalar){.value = &epsilon}, &(XLA_FFI_Scalar){.value = &heads}};
    Arrays in = {.count = 0}, out = {.count = 0};
    add_typed(&in, type, DIMS(sentences, words, channels), 1);
    add(&in, DIMS(2, sentences), 1);
    Arrays *both[] = {&in, &out};
    if (gradient) add_typed(&out, type, DIMS(sentences, words, channels), 0);
    for (int i = 0; i < 1 + gradient; i++) {
        Arrays *to = both[i];
        add(to, DIMS(normed), !i);
        add(to, DIMS(normed), !i);
        add(to, DIMS(channels, 3 * channels), !i);
        add(to, DIMS(channels, channels), !i);
        add(to, DIMS(channels), !i);
        add(to, DIMS(normed), !i);
        add(to, DIMS(normed), !i);
        add(to, DIMS(channels, hidden), !i);
        add(to, DIMS(hidden), !i);
        add(to, DIMS(hidden, channels), !i);
        add(to, DIMS(channels), !i);
    }
    if (gradient)
        add_typed(&in, type, DIMS(sentences, words, channels), 1);
    else
        add_typed(&out, type, DIMS(sentences, words, channels), 0);
    call(gradient ? inner_layer_gradient : inner_layer_forward, &in, &out, attrs);
}
#elif defined TRANSPOSE
static void once(int gradient) {
    int64_t rows = 1 + chance(100), columns = 1 + chance(100);
    Arrays in = {.count = 0}, out = {.count = 0};
    add_typed(&in, XLA_FFI_DataType_BF16, DIMS(rows, columns), 1);
    add_typed(&out, XLA_FFI_DataType_BF16, DIMS(columns, rows), 0);
    call(transpose, &in, &out, NULL);
    (void)gradient;
}
#else
static void once(int gradient) {
    XLA_FFI_DataType type = chance(2) ? XLA_FFI_DataType_F32 : XLA_FFI_DataType_BF16;
    int64_t images = 1 + chance(4), tokens = 1 + chance(chance(4) ? 60 : 200), heads = 1 + chance(4);
    int64_t dim = heads * (1 + chance(chance(4) ? 20 : 70));
    void *attrs[] = {&(XLA_FFI_Scalar){.value = &heads}};
    Arrays in = {.count = 0}, out = {.count = 0};
    add_typed(&in, type, DIMS(images, tokens, 3 * dim), 1);
    if (gradient) {
        add_typed(&in, type, DIMS(images, tokens, dim), 1);
        add_typed(&out, type, DIMS(images, tokens, 3 * dim), 0);
    } else {
        add_typed(&out, type, DIMS(images, tokens, dim), 0);
    }
    call(gradient ? attention_gradient : attention_forward, &in, &out, attrs);
}
#endif

int main(int count, char **arguments) {
    int turns = atoi(arguments[1]);
    state = strtoull(arguments[2], NULL, 10);
    for (int turn = 0; turn < turns; turn++) {
        once(0);
        once(1);
    }
    printf("%d calls\n", 2 * turns);
    return count != 3;
}
