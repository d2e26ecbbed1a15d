/*
 * A stand-in for CANN on test machines without an NPU.
 *
 * Purpose: let the real torch_npu wheel load and initialise where there is no
 * Ascend driver, so that operator schemas, shape (Meta) functions and autograd
 * formulas of torch_npu can be exercised.  Host memory plays the role of device
 * memory; streams, events and timeouts are no-ops.  No operator kernel exists
 * here: anything that tries to launch one gets an error code back.
 *
 * Behaviour is chosen by environment variables read at each call:
 *   STUB_NPU_COUNT  number of visible devices          (default 0)
 *   STUB_NPU_SOC    SoC name reported by the runtime   (default Ascend910B2)
 *   STUB_NPU_MEM    bytes of memory each device claims (default 64 GiB)
 *   STUB_NPU_TRACE  if set, print the name of each interesting call
 */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

typedef int aclError;
#define OK 0
#define ERR_INVALID 100000      /* ACL_ERROR_INVALID_PARAM */
#define ERR_NODEV 107002        /* ACL_ERROR_RT_CONTEXT_NULL */
#define ERR_UNSUPPORTED 207000  /* ACL_ERROR_RT_FEATURE_NOT_SUPPORT */

static void trace(const char *n) { if (getenv("STUB_NPU_TRACE")) fprintf(stderr, "[cann-stub] %s\n", n); }
static long env_long(const char *n, long d) { const char *v = getenv(n); return v && *v ? atol(v) : d; }
#define TRACE() trace(__func__)
#define NOOP(name) aclError name(void) { TRACE(); return OK; }
#define FAIL(name) aclError name(void) { TRACE(); return ERR_UNSUPPORTED; }

/* ---------------------------------------------------------------- process */
NOOP(aclInit) NOOP(aclFinalize) NOOP(aclAppLog)
NOOP(aclmdlInitDump) NOOP(aclmdlSetDump) NOOP(aclmdlFinalizeDump)
const char *aclGetRecentErrMsg(void) { return "CANN stub: no device code is available"; }
const char *aclrtGetSocName(void) { const char *v = getenv("STUB_NPU_SOC"); return v && *v ? v : "Ascend910B2"; }
aclError aclrtGetVersion(int32_t *a, int32_t *b, int32_t *c) { *a = 1; *b = 0; *c = 0; return OK; }
aclError aclGetDeviceCapability(uint32_t dev, int what, int64_t *v) { (void)dev; (void)what; if (v) *v = 1; return OK; }
aclError aclrtGetDeviceInfo(uint32_t dev, int what, int64_t *v) { (void)dev; (void)what; if (v) *v = 0; return OK; }
aclError aclGetCannAttributeList(const int **list, size_t *n) { static int none[1]; *list = none; *n = 0; return OK; }
/* the one attribute torch_npu asks for is IEEE inf/nan arithmetic: on 910B and later, not on 910A and 310 */
static int modern(void)
{
    const char *n = aclrtGetSocName();      /* plain "Ascend910B" is a first generation part; 910B1, 910B2 ... are not */
    return (!strncmp(n, "Ascend910B", 10) && n[10] >= '1' && n[10] <= '9') || !strncmp(n, "Ascend910_9", 11) || !strncmp(n, "Ascend95", 8);
}
aclError aclGetCannAttribute(int what, int32_t *v) { (void)what; *v = modern(); return OK; }
aclError aclrtPeekAtLastError(int level) { (void)level; return OK; }
aclError aclrtGetLastError(int level) { (void)level; return OK; }

/* ----------------------------------------------------------------- device */
static __thread int cur_dev = -1;
aclError aclrtGetDeviceCount(uint32_t *n) { *n = (uint32_t)env_long("STUB_NPU_COUNT", 0); return OK; }
aclError aclrtSetDevice(int32_t d) { TRACE(); cur_dev = d; return OK; }
aclError aclrtGetDevice(int32_t *d) { if (cur_dev < 0) return ERR_NODEV; *d = cur_dev; return OK; }
aclError aclrtResetDevice(int32_t d) { (void)d; cur_dev = -1; return OK; }
aclError aclrtResetDeviceForce(int32_t d) { (void)d; cur_dev = -1; return OK; }
aclError aclrtSetCurrentContext(void *c) { cur_dev = (int)((intptr_t)c & 0xff) - 1; return OK; }
aclError aclrtGetCurrentContext(void **c) { *c = (void *)(intptr_t)(0x1000 + cur_dev + 1); return OK; }
aclError aclrtGetLogicDevIdByUserDevId(const int32_t u, int32_t *l) { *l = u; return OK; }
aclError aclrtGetPrimaryCtxState(int32_t d, uint32_t *f, int32_t *a) { if (f) *f = 0; if (a) *a = (d == cur_dev); return OK; }
aclError aclrtGetDeviceUtilizationRate(int32_t d, void *i) { (void)d; (void)i; return OK; }
aclError aclrtDeviceCanAccessPeer(int32_t *can, int32_t a, int32_t b) { (void)a; (void)b; *can = 1; return OK; }
NOOP(aclrtDeviceEnablePeerAccess)
aclError aclrtDeviceGetBareTgid(int32_t *p) { *p = (int32_t)getpid(); return OK; }
aclError aclrtDeviceGetUuid(int32_t d, void *u) { memset(u, d, 16); return OK; }
NOOP(aclrtSetDeviceSatMode)
NOOP(aclrtSetOpExecuteTimeOut)
NOOP(aclrtSetOpWaitTimeout)
aclError aclrtSetOpExecuteTimeOutV2(uint64_t t, uint64_t *real) { if (real) *real = t; return OK; }
NOOP(aclrtSynchronizeDevice) NOOP(aclrtSynchronizeDeviceWithTimeout) NOOP(aclrtDeviceTaskAbort)
aclError aclrtGetDeviceResLimit(int32_t d, int t, uint32_t *v) { (void)d; *v = t ? 48 : 24; return OK; }
NOOP(aclrtSetDeviceResLimit) NOOP(aclrtResetDeviceResLimit)

/* ----------------------------------------------------------------- memory */
static size_t mem_total(void) { return (size_t)env_long("STUB_NPU_MEM", 64L << 30); }
static size_t mem_used;
static aclError get_mem(void **p, size_t n)
{
    size_t *h;
    if (!p || !n) return ERR_INVALID;
    if (posix_memalign((void **)&h, 512, n + 512)) return 207001; /* out of memory */
    h[0] = n; __sync_fetch_and_add(&mem_used, n);
    *p = (char *)h + 512; return OK;
}
static aclError put_mem(void *p)
{
    size_t *h; if (!p) return ERR_INVALID;
    h = (size_t *)((char *)p - 512); __sync_fetch_and_sub(&mem_used, h[0]); free(h); return OK;
}
aclError aclrtMalloc(void **p, size_t n, int policy) { (void)policy; return get_mem(p, n); }
aclError aclrtMallocAlign32(void **p, size_t n, int policy) { (void)policy; return get_mem(p, n); }
aclError aclrtMallocHost(void **p, size_t n) { return get_mem(p, n); }
aclError aclrtMallocHostWithCfg(void **p, uint64_t n, void *cfg) { (void)cfg; return get_mem(p, n); }
aclError aclrtFree(void *p) { return put_mem(p); }
aclError aclrtFreeHost(void *p) { return put_mem(p); }
aclError aclrtGetMemInfo(int attr, size_t *fre, size_t *tot) { (void)attr; *tot = mem_total(); *fre = *tot - mem_used; return OK; }
aclError aclrtMemcpy(void *d, size_t dn, const void *s, size_t n, int kind) { (void)dn; (void)kind; if (n) memmove(d, s, n); return OK; }
aclError aclrtMemcpyAsync(void *d, size_t dn, const void *s, size_t n, int kind, void *st) { (void)st; return aclrtMemcpy(d, dn, s, n, kind); }
aclError aclrtMemcpyAsyncWithCondition(void *d, size_t dn, const void *s, size_t n, int kind, void *st) { (void)st; return aclrtMemcpy(d, dn, s, n, kind); }
aclError aclrtMemset(void *d, size_t dn, int32_t v, size_t n) { (void)dn; memset(d, v, n); return OK; }
aclError aclrtMemsetAsync(void *d, size_t dn, int32_t v, size_t n, void *st) { (void)st; return aclrtMemset(d, dn, v, n); }
/* attributes: location.id, location.type(0 host, 1 device) first; the size of the rest is unknown, leave it alone */
aclError aclrtPointerGetAttributes(const void *p, void *a) { (void)p; (void)a; return ERR_UNSUPPORTED; }
aclError aclrtHostRegister(void *p, uint64_t n, int t, void **d) { (void)n; (void)t; if (d) *d = p; return OK; }
aclError aclrtHostRegisterV2(void *p, uint64_t n, uint32_t f) { (void)p; (void)n; (void)f; return OK; }
NOOP(aclrtHostUnregister)
FAIL(aclrtReserveMemAddress) FAIL(aclrtReleaseMemAddress) FAIL(aclrtMallocPhysical) FAIL(aclrtFreePhysical)
FAIL(aclrtMapMem) FAIL(aclrtUnmapMem)
FAIL(aclrtMemExportToShareableHandle) FAIL(aclrtMemImportFromShareableHandle) FAIL(aclrtMemSetPidToShareableHandle)

/* ------------------------------------------------------- streams and events */
static aclError handle(void **h) { static intptr_t next = 0x100000; *h = (void *)__sync_add_and_fetch(&next, 16); return OK; }
aclError aclrtCreateStream(void **s) { return handle(s); }
aclError aclrtCreateStreamWithConfig(void **s, uint32_t prio, uint32_t flag) { (void)prio; (void)flag; return handle(s); }
NOOP(aclrtDestroyStream) NOOP(aclrtDestroyStreamForce) NOOP(aclrtSetStreamFailureMode) NOOP(aclrtSetStreamAttribute)
NOOP(aclrtSynchronizeStream) NOOP(aclrtSynchronizeStreamWithTimeout)
NOOP(aclrtStreamWaitEvent) NOOP(aclrtSetStreamOverflowSwitch)
aclError aclrtGetStreamOverflowSwitch(void *s, uint32_t *f) { (void)s; *f = 0; return OK; }
aclError aclrtStreamQuery(void *s, int *st) { (void)s; *st = 0; return OK; }
aclError aclrtStreamGetId(void *s, int32_t *id) { *id = (int32_t)((intptr_t)s & 0xffff); return OK; }

typedef struct { struct timespec t; } stub_event;
static aclError new_event(void **e) { *e = calloc(1, sizeof(stub_event)); return OK; }
aclError aclrtCreateEvent(void **e) { return new_event(e); }
aclError aclrtCreateEventWithFlag(void **e, uint32_t f) { (void)f; return new_event(e); }
aclError aclrtCreateEventExWithFlag(void **e, uint32_t f) { (void)f; return new_event(e); }
aclError aclrtDestroyEvent(void *e) { free(e); return OK; }
aclError aclrtRecordEvent(void *e, void *s) { (void)s; clock_gettime(CLOCK_MONOTONIC, &((stub_event *)e)->t); return OK; }
NOOP(aclrtResetEvent) NOOP(aclrtSynchronizeEvent)
aclError aclrtQueryEventStatus(void *e, int *st) { (void)e; *st = 1; return OK; }        /* recorded and complete */
aclError aclrtQueryEventWaitStatus(void *e, int *st) { (void)e; *st = 0; return OK; }    /* complete */
aclError aclrtEventGetTimestamp(void *e, uint64_t *us) { struct timespec *t = &((stub_event *)e)->t; *us = t->tv_sec * 1000000ull + t->tv_nsec / 1000; return OK; }
aclError aclrtEventElapsedTime(float *ms, void *a, void *b)
{
    struct timespec *s = &((stub_event *)a)->t, *e = &((stub_event *)b)->t;
    *ms = (float)((e->tv_sec - s->tv_sec) * 1e3 + (e->tv_nsec - s->tv_nsec) / 1e6); return OK;
}
NOOP(aclrtSubscribeReport) NOOP(aclrtUnSubscribeReport) NOOP(aclrtProcessReport) NOOP(aclrtLaunchCallback)
aclError aclmdlRICaptureGetInfo(void *s, int *st, void **m) { (void)s; *st = 0; if (m) *m = NULL; return OK; } /* no capture running */

/* ---------------------------------------------------- operator descriptions */
void *aclCreateTensorDesc(void) { return calloc(1, 64); }
void aclDestroyTensorDesc(void *d) { free(d); }
void *aclCreateDataBuffer(void *p, size_t n) { void **b = calloc(2, sizeof(void *)); b[0] = p; b[1] = (void *)n; return b; }
aclError aclDestroyDataBuffer(void *b) { free(b); return OK; }
NOOP(aclSetTensorDescName) NOOP(aclSetTensorFormat) NOOP(aclSetTensorPlaceMent) NOOP(aclSetTensorShape)
aclError aclGetTensorDescDimV2(void *d, size_t i, int64_t *v) { (void)d; (void)i; *v = 0; return OK; }
int aclGetTensorDescFormat(void *d) { (void)d; return 2; }
size_t aclGetTensorDescNumDims(void *d) { (void)d; return 0; }
int aclGetTensorDescType(void *d) { (void)d; return 0; }
void *aclopCreateAttr(void) { return calloc(1, 16); }
void aclopDestroyAttr(void *a) { free(a); }
NOOP(aclopSetAttrBool) NOOP(aclopSetAttrDataType) NOOP(aclopSetAttrFloat) NOOP(aclopSetAttrInt)
NOOP(aclopSetAttrListBool) NOOP(aclopSetAttrListFloat) NOOP(aclopSetAttrListInt) NOOP(aclopSetAttrListListInt)
NOOP(aclopSetAttrString)
FAIL(aclopCompileAndExecute)

/* --------------------------------------------------------- kernels, profiling */
FAIL(aclrtBinaryGetFunction) FAIL(aclrtBinaryLoadFromData) FAIL(aclrtGetFunctionAddr)
FAIL(rtDevBinaryRegister) FAIL(rtFunctionRegister) FAIL(rtGetC2cCtrlAddr) FAIL(rtKernelLaunch)
NOOP(MsprofGetHashId) NOOP(MsprofRegisterCallback) NOOP(MsprofReportAdditionalInfo) NOOP(MsprofReportApi)
NOOP(MsprofReportCompactInfo)
uint64_t MsprofSysCycleTime(void) { return 0; }
/* torch_npu's profiler starts and stops; a trace then holds what the host did. */
NOOP(aclprofInit) NOOP(aclprofFinalize) NOOP(aclprofSetConfig) NOOP(aclprofWarmup) NOOP(aclprofStart)
NOOP(aclprofStop) NOOP(aclprofDestroyConfig) FAIL(aclprofGetSupportedFeatures)
void *aclprofCreateConfig(void) { static int config; return &config; }
