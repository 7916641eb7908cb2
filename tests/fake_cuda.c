/* A libcuda without a GPU: it records what is asked of it, fails where it is told to, and runs a kernel's C build where a
   kernel is launched, on the CPU's memory. And a stream for XLA's calls, which a CPU has not. */
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "xla/ffi/api/c_api.h"

typedef struct {
    char kernel[64];
    unsigned grid[3], block[3], shared;
    void *stream, *parameters[16], *context;
    int count, loads, launches, contexts_left, shared_allowed;
} Seen;
Seen seen;

static struct { char name[64]; void *function; int parameters; } kernels[8];
typedef struct { char name[64]; int shared; } Function;
static _Thread_local void *contexts[8];
static _Thread_local int depth;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char failing[64];
static int failing_code;

void fail(const char *name, int code) { strcpy(failing, name), failing_code = code; }

void run_for(const char *name, void *function, int parameters) {
    int i = 0;
    while (*kernels[i].name && strcmp(kernels[i].name, name)) i++;
    strcpy(kernels[i].name, name), kernels[i].function = function, kernels[i].parameters = parameters;
}

static int code_of(const char *name) { return strcmp(name, failing) ? 0 : failing_code; }

int cuStreamGetCtx(void *stream, void **context) {
    *context = (void *)((uintptr_t)stream / 256 * 256);
    return code_of("cuStreamGetCtx");
}

int cuCtxPushCurrent_v2(void *context) {
    if (code_of("cuCtxPushCurrent")) return failing_code;
    contexts[depth++] = context;
    return 0;
}

int cuCtxPopCurrent_v2(void **context) {
    *context = contexts[--depth];
    seen.contexts_left = depth;
    return 0;
}

int cuModuleLoadDataEx(void **module, const char *image, unsigned count, int *options, void **values) {
    seen.loads++;
    seen.context = contexts[depth - 1];
    if (code_of("cuModuleLoadDataEx") && count == 2 && options[0] == 5 && options[1] == 6 && (uintptr_t)values[1] > 20)
        strcpy(values[0], "ptxas: line 7");
    *module = (void *)image;
    return strstr(image, ".entry") && image[strlen(image) - 1] == '\n' ? code_of("cuModuleLoadDataEx") : 218;
}

int cuModuleGetFunction(void **function, void *module, const char *name) {
    (void)module;
    Function *made = calloc(1, sizeof *made);
    strcpy(made->name, name), made->shared = 48 * 1024;
    *function = made;
    return code_of("cuModuleGetFunction");
}

int cuFuncSetAttribute(Function *function, int attribute, int value) {
    if (attribute != 8) return 1;
    function->shared = value;
    return code_of("cuFuncSetAttribute");
}

int cuLaunchKernel(Function *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **parameters, void **extra) {
    if (code_of("cuLaunchKernel")) return failing_code;
    if (!depth || extra || (int)shared > function->shared) return 1;
    int i = 0;
    while (*kernels[i].name && strcmp(kernels[i].name, function->name)) i++;
    void *p[16];
    for (int j = 0; j < kernels[i].parameters; j++) p[j] = *(void **)parameters[j];
    pthread_mutex_lock(&lock);
    int launches = seen.launches + 1, loads = seen.loads;
    seen = (Seen){.grid = {gx, gy, gz}, .block = {bx, by, bz}, .shared = shared, .stream = stream};
    seen.launches = launches, seen.loads = loads, seen.count = kernels[i].parameters, seen.context = contexts[depth - 1];
    seen.shared_allowed = function->shared;
    strcpy(seen.kernel, function->name), memcpy(seen.parameters, p, sizeof p);
    if (seen.count == 6)
        ((void (*)(void *, void *, void *, void *, void *, void *))kernels[i].function)(p[0], p[1], p[2], p[3], p[4], p[5]);
    if (seen.count == 7)
        ((void (*)(void *, void *, void *, void *, void *, void *, void *))kernels[i].function)(p[0], p[1], p[2], p[3],
                                                                                                  p[4], p[5], p[6]);
    pthread_mutex_unlock(&lock);
    return 0;
}

int cuGetErrorName(int code, const char **name) { return *name = code == 700 ? "CUDA_ERROR_OF_A_TEST" : NULL, 0; }

int cuGetErrorString(int code, const char **text) { return *text = code == 700 ? "the driver's words" : NULL, 0; }

/* A call of XLA's for a CPU, handed on with a stream. */
static XLA_FFI_Handler *handler;
static void *stream_of_all;
static int initializes;

void hand_on_to(void *to, void *stream, int first_initializes) {
    handler = (XLA_FFI_Handler *)to, stream_of_all = stream, initializes = first_initializes;
}

static XLA_FFI_Error *get_stream(XLA_FFI_Stream_Get_Args *args) { return args->stream = stream_of_all, NULL; }

XLA_FFI_Error *with_stream(XLA_FFI_CallFrame *call) {
    XLA_FFI_Extension_Base *extension = call->extension_start;
    if (extension && extension->type == XLA_FFI_Extension_Metadata) return handler(call);
    XLA_FFI_Api api = *call->api;
    XLA_FFI_CallFrame copy = *call;
    api.XLA_FFI_Stream_Get = get_stream, copy.api = &api;
    if (initializes) {
        copy.stage = XLA_FFI_ExecutionStage_INITIALIZE;
        XLA_FFI_Error *error = handler(&copy);
        if (error) return error;
        copy.stage = call->stage;
    }
    return handler(&copy);
}
