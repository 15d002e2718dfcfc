// libcudnn: nothing of it runs. Its run-time version is below the 8.9.3 from which PyTorch would choose its attention.
#include "phantom.h"
static char handle;
size_t cudnnGetVersion(void) { return 8900; }
size_t cudnnGetCudartVersion(void) { return PHANTOM_CUDA * 10; }
// What torch.backends.cudnn compares with the version that PyTorch was built with.
int cudnnGetProperty(int property, int *value) { *value = property == 0 ? 9 : property == 1 ? 99 : 0; return 0; }
int cudnnCreate(void **made) { *made = &handle; return 0; }
