// A tool that NVTX loads (NVTX_INJECTION64_PATH): writes what is pushed and popped to $RECORDED.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
  uint16_t version, size;
  uint32_t category;
  int32_t color_type;
  uint32_t color;
  int32_t payload_type, reserved;
  uint64_t payload;
  int32_t message_type;
  const char* message;  // the handle of a registered string: what `registered` returns
} Attributes;

typedef struct {
  size_t size;
  int (*table_of)(int module, void**** table, unsigned* size);
} Callbacks;

enum { CALLBACKS = 1, CORE2 = 5, PUSH = 4, POP = 5, NAME = 8, REGISTER = 10, CREATE = 12 };

static FILE* out;

static int push(const char* domain, const Attributes* a) {
  fprintf(out, "push %s %u %06x %s\n", domain, a->category, a->color, a->message);
  return 0;
}
static int pop(const char* domain) { return fprintf(out, "pop %s\n", domain), 0; }
static void name(const char* domain, uint32_t category, const char* text) {
  fprintf(out, "category %s %u %s\n", domain, category, text);
}
static char* registered(const char* domain, const char* text) { return strdup(text); }
static char* create(const char* text) { return strdup(text); }

int InitializeInjectionNvtx2(const void* (*table)(uint32_t)) {
  const Callbacks* callbacks = table(CALLBACKS);
  void*** functions;
  unsigned size;
  if (!callbacks || !callbacks->table_of(CORE2, &functions, &size)) return 0;
  *functions[PUSH] = push, *functions[POP] = pop, *functions[NAME] = name;
  *functions[REGISTER] = registered, *functions[CREATE] = create;
  out = fopen(getenv("RECORDED"), "w");
  return out != NULL;
}
