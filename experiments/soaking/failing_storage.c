/* Makes the first FAILURES calls of FUNCTION on files whose path has MATCH in it
   fail with the error number ERROR, for a process that preloads this. With
   CHANCE it is not the first calls but one of that many, at random. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

static atomic_int failed;

static int fails(const char *function, int file) {
  const char *match = getenv("MATCH");
  char link[64], path[4096];
  if (!match || strcmp(getenv("FUNCTION"), function)) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  if (!strstr(path, match)) return 0;
  const char *chance = getenv("CHANCE");
  if (chance) {
    static _Thread_local unsigned seed;
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    seed ^= now.tv_nsec;
    if (rand_r(&seed) % atoi(chance)) return 0;
  }
  if (atomic_fetch_add(&failed, 1) >= atoi(getenv("FAILURES"))) return 0;
  errno = atoi(getenv("ERROR"));
  return 1;
}

int fsync(int file) {
  int (*next)(int) = dlsym(RTLD_NEXT, "fsync");
  return fails("fsync", file) ? -1 : next(file);
}

ssize_t pread(int file, void *to, size_t size, off_t at) {
  ssize_t (*next)(int, void *, size_t, off_t) = dlsym(RTLD_NEXT, "pread");
  return fails("pread", file) ? -1 : next(file, to, size, at);
}

ssize_t pread64(int file, void *to, size_t size, off64_t at) {
  ssize_t (*next)(int, void *, size_t, off64_t) = dlsym(RTLD_NEXT, "pread64");
  return fails("pread", file) ? -1 : next(file, to, size, at);
}
