/* What a typed FFI handler of XLA's needs: the buffers of a call, its errors, and the question of its version. */

#include "xla/ffi/api/c_api.h"

static XLA_FFI_Error *error_of(const XLA_FFI_CallFrame *call, XLA_FFI_Error_Code code, const char *message) {
    XLA_FFI_Error_Create_Args args = {XLA_FFI_Error_Create_Args_STRUCT_SIZE, NULL, message, code};
    return call->api->XLA_FFI_Error_Create(&args);
}

/* Whether XLA asks for the version and the traits (XLA_FFI_HANDLER_TRAITS_...), which this answers, and nothing else. */
static int is_question_of_version(XLA_FFI_CallFrame *call, XLA_FFI_Handler_Traits traits) {
    __typeof__(call->extension_start) extension = call->extension_start; /* its type's name depends on the release */
    if (!extension || extension->type != XLA_FFI_Extension_Metadata) return 0;
    XLA_FFI_Metadata *metadata = ((XLA_FFI_Metadata_Extension *)extension)->metadata;
    metadata->api_version.major_version = XLA_FFI_API_MAJOR;
    metadata->api_version.minor_version = XLA_FFI_API_MINOR;
    metadata->traits = traits;
    return 1;
}

static const XLA_FFI_Buffer *argument(const XLA_FFI_CallFrame *call, int i) { return call->args.args[i]; }

static const XLA_FFI_Buffer *result(const XLA_FFI_CallFrame *call, int i) { return call->rets.rets[i]; }
