/* Launches a CUDA kernel from a program of XLA's, as a typed FFI handler over the driver (libcuda), on XLA's stream.

   The kernel's PTX stands in the program and is loaded once for each context, in the stage `initialize` if XLA has it,
   since nothing may be loaded while a command buffer is captured. A launch is then the same operation in every call,
   which is what a command buffer asks for. Loaded modules stay until the process ends.

   Arguments and results: buffers, whose addresses the kernel takes in this order.
   Attributes: `kernel`, its name; `image`, its PTX; `key`, 8 bytes of the digest of the image; `grid`, `block` and
   `shared`: blocks, threads of a block, and bytes of shared memory of a block. */
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../xla_ffi.h"

/* Of cuda.h, which need not be there. */
typedef int CUresult;
typedef void *CUcontext, *CUmodule, *CUfunction, *CUstream;
enum { JIT_ERROR_LOG_BUFFER = 5, JIT_ERROR_LOG_BUFFER_SIZE_BYTES = 6 };
enum { MAX_DYNAMIC_SHARED_SIZE_BYTES = 8 };
enum { SHARED_FOR_ALL = 48 * 1024 }; /* a kernel may have so much without asking for it */

static struct {
    CUresult (*cuStreamGetCtx)(CUstream, CUcontext *);
    CUresult (*cuCtxPushCurrent_v2)(CUcontext);
    CUresult (*cuCtxPopCurrent_v2)(CUcontext *);
    CUresult (*cuModuleLoadDataEx)(CUmodule *, const void *, unsigned, int *, void **);
    CUresult (*cuModuleGetFunction)(CUfunction *, CUmodule, const char *);
    CUresult (*cuFuncSetAttribute)(CUfunction, int, int);
    CUresult (*cuLaunchKernel)(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                               CUstream, void **, void **);
    CUresult (*cuGetErrorName)(CUresult, const char **);
    CUresult (*cuGetErrorString)(CUresult, const char **);
} driver;

typedef struct Loaded {
    CUcontext context;
    int64_t key;
    CUfunction function;
    int shared; /* bytes that a block may have */
    struct Loaded *next;
} Loaded;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* of all below */
static Loaded *loaded;
static int driver_is_there;

typedef struct {
    const char *kernel, *image; /* of these lengths, with no 0 at the end */
    size_t kernel_length, image_length;
    int64_t key;
    int grid, block, shared;
    CUstream stream;
} Launch;

enum { MOST_BUFFERS = 16, MOST_TEXT = 1024, MOST_LOG = 600, MOST_NAME = 64 };

typedef struct { char text[MOST_TEXT]; } Failure; /* empty: none */

/* Whether a call of the driver failed, which is then said with the driver's own words. */
static int fails(Failure *failure, const Launch *launch, const char *call, CUresult code) {
    if (!code) return 0;
    const char *name = NULL, *text = NULL;
    driver.cuGetErrorName(code, &name), driver.cuGetErrorString(code, &text);
    snprintf(failure->text, sizeof failure->text, "CUDA kernel %.*s: %s failed: %s (%s, %d)", (int)launch->kernel_length,
             launch->kernel, call, text ? text : "unknown", name ? name : "unknown", code);
    return 1;
}

static int load_driver(Failure *failure) {
    if (driver_is_there) return 1;
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    const char *missing = library ? NULL : dlerror();
#define LOAD(name) \
    if (library && !missing && !(*(void **)&driver.name = dlsym(library, #name))) missing = "it has no " #name
    LOAD(cuStreamGetCtx);
    LOAD(cuCtxPushCurrent_v2);
    LOAD(cuCtxPopCurrent_v2);
    LOAD(cuModuleLoadDataEx);
    LOAD(cuModuleGetFunction);
    LOAD(cuFuncSetAttribute);
    LOAD(cuLaunchKernel);
    LOAD(cuGetErrorName);
    LOAD(cuGetErrorString);
#undef LOAD
    if (missing) snprintf(failure->text, sizeof failure->text, "NVIDIA's driver libcuda.so.1 cannot be used: %s", missing);
    return driver_is_there = !missing;
}

static Loaded *find(CUcontext context, int64_t key) {
    Loaded *each = loaded;
    while (each && (each->context != context || each->key != key)) each = each->next;
    return each;
}

static Loaded *load(CUcontext context, const Launch *launch, Failure *failure) {
    char log[MOST_LOG] = "", name[MOST_NAME];
    snprintf(name, sizeof name, "%.*s", (int)launch->kernel_length, launch->kernel);
    int options[] = {JIT_ERROR_LOG_BUFFER, JIT_ERROR_LOG_BUFFER_SIZE_BYTES};
    void *values[] = {log, (void *)(uintptr_t)(sizeof log - 1)};
    char *image = malloc(launch->image_length + 1);
    Loaded *made = calloc(1, sizeof *made);
    CUmodule module;
    if (!image || !made) {
        snprintf(failure->text, sizeof failure->text, "there is no memory left");
    } else {
        memcpy(image, launch->image, launch->image_length), image[launch->image_length] = 0;
        if (fails(failure, launch, "cuModuleLoadDataEx", driver.cuModuleLoadDataEx(&module, image, 2, options, values))) {
            size_t end = strlen(failure->text);
            if (*log) snprintf(failure->text + end, sizeof failure->text - end, ": %s", log);
        } else if (!fails(failure, launch, "cuModuleGetFunction",
                          driver.cuModuleGetFunction(&made->function, module, name))) {
            made->context = context, made->key = launch->key, made->shared = SHARED_FOR_ALL;
            made->next = loaded, loaded = made;
        }
    }
    free(image);
    if (*failure->text) free(made), made = NULL;
    return made;
}

/* The kernel, loaded into the context, which is the current one, and allowed the shared memory that it wants. */
static CUfunction function_in(CUcontext context, const Launch *launch, Failure *failure) {
    pthread_mutex_lock(&lock);
    Loaded *found = find(context, launch->key);
    if (!found) found = load(context, launch, failure);
    if (found && launch->shared > found->shared &&
        !fails(failure, launch, "cuFuncSetAttribute",
               driver.cuFuncSetAttribute(found->function, MAX_DYNAMIC_SHARED_SIZE_BYTES, launch->shared)))
        found->shared = launch->shared;
    pthread_mutex_unlock(&lock);
    return *failure->text ? NULL : found->function;
}

static void run(const XLA_FFI_CallFrame *call, const Launch *launch, Failure *failure) {
    CUcontext context;
    pthread_mutex_lock(&lock);
    int is_there = load_driver(failure);
    pthread_mutex_unlock(&lock);
    if (!is_there || fails(failure, launch, "cuStreamGetCtx", driver.cuStreamGetCtx(launch->stream, &context))) return;
    if (fails(failure, launch, "cuCtxPushCurrent", driver.cuCtxPushCurrent_v2(context))) return;
    CUfunction function = function_in(context, launch, failure);
    if (function && call->stage == XLA_FFI_ExecutionStage_EXECUTE) {
        void *addresses[MOST_BUFFERS], *parameters[MOST_BUFFERS];
        int count = (int)(call->args.size + call->rets.size);
        for (int i = 0; i < count; i++) {
            addresses[i] = i < call->args.size ? argument(call, i)->data : result(call, i - call->args.size)->data;
            parameters[i] = addresses + i;
        }
        fails(failure, launch, "cuLaunchKernel",
              driver.cuLaunchKernel(function, launch->grid, 1, 1, launch->block, 1, 1, launch->shared, launch->stream,
                                    parameters, NULL));
    }
    driver.cuCtxPopCurrent_v2(&context);
}

static const void *attribute(const XLA_FFI_CallFrame *call, const char *name, XLA_FFI_AttrType type) {
    for (int64_t i = 0; i < call->attrs.size; i++) {
        const XLA_FFI_ByteSpan *there = call->attrs.names[i];
        if (there->len == strlen(name) && !memcmp(there->ptr, name, there->len) && call->attrs.types[i] == type)
            return call->attrs.attrs[i];
    }
    return NULL;
}

static int read_number(const XLA_FFI_CallFrame *call, const char *name, XLA_FFI_DataType type, void *to, size_t bytes) {
    const XLA_FFI_Scalar *scalar = attribute(call, name, XLA_FFI_AttrType_SCALAR);
    if (!scalar || scalar->dtype != type) return 0;
    memcpy(to, scalar->value, bytes);
    return 1;
}

static int read_text(const XLA_FFI_CallFrame *call, const char *name, const char **text, size_t *length) {
    const XLA_FFI_ByteSpan *span = attribute(call, name, XLA_FFI_AttrType_STRING);
    if (span) *text = span->ptr, *length = span->len;
    return span != NULL;
}

static int read_launch(const XLA_FFI_CallFrame *call, Launch *launch) {
    return call->args.size + call->rets.size <= MOST_BUFFERS &&
           read_text(call, "kernel", &launch->kernel, &launch->kernel_length) && launch->kernel_length < MOST_NAME &&
           read_text(call, "image", &launch->image, &launch->image_length) &&
           read_number(call, "key", XLA_FFI_DataType_S64, &launch->key, sizeof launch->key) &&
           read_number(call, "grid", XLA_FFI_DataType_S32, &launch->grid, sizeof launch->grid) &&
           read_number(call, "block", XLA_FFI_DataType_S32, &launch->block, sizeof launch->block) &&
           read_number(call, "shared", XLA_FFI_DataType_S32, &launch->shared, sizeof launch->shared);
}

XLA_FFI_Error *launch_cuda(XLA_FFI_CallFrame *call) {
    if (is_question_of_version(call, XLA_FFI_HANDLER_TRAITS_COMMAND_BUFFER_COMPATIBLE)) return NULL;
    Launch launch = {0};
    if (!read_launch(call, &launch))
        return error_of(call, XLA_FFI_Error_Code_INVALID_ARGUMENT, "launch_cuda: a call with other attributes");
    XLA_FFI_Stream_Get_Args stream = {XLA_FFI_Stream_Get_Args_STRUCT_SIZE, NULL, call->ctx, NULL};
    XLA_FFI_Error *error = call->api->XLA_FFI_Stream_Get(&stream);
    if (error) return error;
    launch.stream = stream.stream;
    Failure failure = {""};
    run(call, &launch, &failure);
    return *failure.text ? error_of(call, XLA_FFI_Error_Code_INTERNAL, failure.text) : NULL;
}
