/* A call by XLA: its arguments and results, and its work in chunks on XLA's own threads. */

#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>

#include "../xla_ffi.h"
#include "lanes.h"

static XLA_FFI_Error *no_memory(const XLA_FFI_CallFrame *call) {
    return error_of(call, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, "there is no memory left");
}

static Array array_of(const XLA_FFI_Buffer *buffer) {
    return (Array){buffer->data, buffer->dtype == XLA_FFI_DataType_BF16};
}

/* What is left over from a call for the next one, so that it needs no new pages. */
static vec *scratch(size count) {
    static _Thread_local vec *kept;
    static _Thread_local size kept_count;
    if (count > kept_count) {
        free(kept);
        kept = aligned_alloc(sizeof(vec), count * sizeof(vec));
        kept_count = kept ? count : 0;
    }
    return kept;
}

typedef struct {
    int (*do_chunk)(void *work, int64_t chunk); /* 0 where there is no memory */
    void *work;
    int64_t chunks;
    atomic_llong next, done;
    atomic_int holders, failed;
} Job;

static void let_go(Job *job, int holders) {
    if (atomic_fetch_sub(&job->holders, holders) == holders) free(job);
}

static void help(void *data) {
    Job *job = data;
    for (int64_t chunk; (chunk = atomic_fetch_add(&job->next, 1)) < job->chunks; atomic_fetch_add(&job->done, 1))
        if (!job->do_chunk(job->work, chunk)) atomic_store(&job->failed, 1);
    let_go(job, 1);
}

/* 1 if there was no error, which is gone then. */
static int succeeded(const XLA_FFI_CallFrame *call, XLA_FFI_Error *error) {
    if (!error) return 1;
    XLA_FFI_Error_Destroy_Args gone = {XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, NULL, error};
    call->api->XLA_FFI_Error_Destroy(&gone);
    return 0;
}

/* Does all chunks, on this thread and on those of XLA's that are free. A thread that comes late finds nothing to do
   and never looks at the work, so none is waited for that has not begun. */
static XLA_FFI_Error *do_all(const XLA_FFI_CallFrame *call, int (*do_chunk)(void *, int64_t), void *work, int64_t chunks) {
    Job *job = malloc(sizeof *job);
    if (!job) return no_memory(call);
    int64_t threads = 1;
    XLA_FFI_ThreadPool_NumThreads_Args size = {XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE, NULL, call->ctx, &threads};
    if (!succeeded(call, call->api->XLA_FFI_ThreadPool_NumThreads(&size))) threads = 1;
    int helpers = (int)(threads < chunks ? threads : chunks) - 1;
    helpers = helpers < 0 ? 0 : helpers;
    *job = (Job){.do_chunk = do_chunk, .work = work, .chunks = chunks};
    atomic_store(&job->holders, helpers + 2); /* each helper, `help` below, and this function */
    for (int i = 0; i < helpers; i++) {
        XLA_FFI_ThreadPool_Schedule_Args task = {XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE, NULL, call->ctx, help, job};
        if (!succeeded(call, call->api->XLA_FFI_ThreadPool_Schedule(&task))) let_go(job, 1);
    }
    help(job);
    while (atomic_load(&job->done) < chunks) sched_yield();
    int done = !atomic_load(&job->failed);
    let_go(job, 1);
    return done ? NULL : no_memory(call);
}
