// A CUDA driver that does nothing: Triton's own launcher runs on it, and it keeps what was launched.
#include <stddef.h>
#include <string.h>

enum { kKept = 1024 };
typedef struct { unsigned grid[3], block[3], shared; void *stream, *attributes; unsigned count; } Config;  // CUlaunchConfig

static struct { char name[64]; unsigned grid[3], threads; void *first; } launches[kKept];
static char functions[kKept][64];
static long launched, loaded;

long driver_launches(void) { return launched; }
const char *driver_name(long i) { return launches[i].name; }
unsigned driver_grid(long i, int axis) { return axis < 3 ? launches[i].grid[axis] : launches[i].threads; }
void *driver_first(long i) { return launches[i].first; }  // the first argument of a launch, a pointer
void driver_reset(void) { launched = 0; }

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int i) { *device = i; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  enum { kRegisters = 12, kProcessors = 16, kMajor = 75, kMinor = 76, kWarp = 10, kSharedOptIn = 97 };
  *value = attribute == kMajor ? 9 : attribute == kMinor ? 0 : attribute == kProcessors ? 132 : attribute == kWarp ? 32
         : attribute == kSharedOptIn ? 232448 : 65536;
  return 0;
}
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuCtxGetLimit(size_t *value, int limit) { *value = 1 << 20; return 0; }
int cuCtxSetLimit(int limit, size_t value) { return 0; }
int cuGetErrorString(int error, const char **text) { *text = "an error"; return 0; }
int cuModuleLoadData(void **module, const void *image) { *module = (void *)1; return 0; }
int cuModuleUnload(void *module) { return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) {
  strncpy(functions[loaded], name, 63);
  *function = functions[loaded++ % kKept];
  return 0;
}
int cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void *function, int config) { return 0; }
int cuFuncGetAttribute(int *value, int attribute, void *function) {
  *value = attribute == 0 ? 1024 : attribute == 4 ? 32 : 0;  // threads of a block, registers
  return 0;
}
int cuOccupancyMaxActiveClusters(int *count, void *function, const Config *config) { *count = 1; return 0; }
int cuStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cuPointerGetAttribute(void *value, int attribute, unsigned long pointer) { *(unsigned long *)value = pointer; return 0; }
int cuPointerGetAttributes(unsigned n, int *attributes, void **values, unsigned long pointer) { return 0; }
int cuTensorMapEncodeTiled(void) { return 0; }
int cuTensorMapEncodeIm2col(void) { return 0; }
int cuLaunchKernelEx(const Config *config, void *function, void **arguments, void **extra) {
  const long i = launched++ % kKept;
  strncpy(launches[i].name, function, 63);
  memcpy(launches[i].grid, config->grid, sizeof config->grid);
  launches[i].threads = config->block[0];
  launches[i].first = *(void **)arguments[0];
  return 0;
}
int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **arguments, void **extra) {
  const Config config = {{x, y, z}, {bx, by, bz}, shared, stream};
  return cuLaunchKernelEx(&config, function, arguments, extra);
}
