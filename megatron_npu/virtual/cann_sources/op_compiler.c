/* Stand-in for libacl_op_compiler.so: compile options are accepted and forgotten. */
#include <stddef.h>
#include <string.h>
int aclSetCompileopt(int opt, const char *v) { (void)opt; (void)v; return 0; }
size_t aclGetCompileoptSize(int opt) { (void)opt; return 16; }
int aclGetCompileopt(int opt, char *v, size_t n) { (void)opt; if (n) { strncpy(v, "enable", n - 1); v[n - 1] = 0; } return 0; }
int aclopCompileAndExecuteV2(void) { return 207000; }
int aclrtSetSysParamOpt(int opt, long v) { (void)opt; (void)v; return 0; }
int aclrtGetSysParamOpt(int opt, long *v) { (void)opt; *v = 0; return 0; }
int aclrtCtxSetSysParamOpt(int opt, long v) { (void)opt; (void)v; return 0; }
