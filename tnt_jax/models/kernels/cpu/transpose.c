/* A matrix of bfloat16 with rows and columns exchanged. transpose.py calls this.

   XLA folds a transposition into the product that follows, and then computes that product in float32. */

#include "xla_call.h"

enum { SIDE = 32 }; /* of a block, which stays in the cache */

typedef struct {
    size rows, columns;
    const uint16_t *in;
    uint16_t *out;
} Matrix;

/* SIDE columns become rows. */
static int do_columns(void *data, size chunk) {
    const Matrix *matrix = data;
    size first = chunk * SIDE, end = first + SIDE < matrix->columns ? first + SIDE : matrix->columns;
    for (size top = 0; top < matrix->rows; top += SIDE) {
        size bottom = top + SIDE < matrix->rows ? top + SIDE : matrix->rows;
        for (size column = first; column < end; column++)
            for (size row = top; row < bottom; row++)
                matrix->out[column * matrix->rows + row] = matrix->in[row * matrix->columns + column];
    }
    return 1;
}

/* Argument: (rows, columns). */
XLA_FFI_Error *transpose(XLA_FFI_CallFrame *call) {
    if (is_question_of_version(call, 0)) return NULL;
    const XLA_FFI_Buffer *in = argument(call, 0);
    Matrix matrix = {in->dims[0], in->dims[1], in->data, result(call, 0)->data};
    return do_all(call, do_columns, &matrix, (matrix.columns + SIDE - 1) / SIDE);
}
