/* Preloaded by the Darwin lane: pages of 16 KiB, and a full table of semaphores on request. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <semaphore.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { PAGE_BYTES = 16384 };

long sysconf(int name)
{
	static long (*real)(int);

	if (name == _SC_PAGESIZE)
		return PAGE_BYTES;
	if (!real)
		real = (long (*)(int))dlsym(RTLD_NEXT, "sysconf");
	return real(name);
}

int getpagesize(void)
{
	return PAGE_BYTES;
}

sem_t *sem_open(const char *name, int flags, ...)
{
	static sem_t *(*real)(const char *, int, ...);
	const char *state = getenv("DARWIN_LANE_SEMAPHORES");
	unsigned int mode = 0, value = 0;
	va_list rest;

	if (!real)
		real = (sem_t *(*)(const char *, int, ...))dlsym(RTLD_NEXT, "sem_open");
	if (!(flags & O_CREAT))
		return real(name, flags);
	if (state && !strcmp(state, "full")) {
		errno = ENOSPC;
		return SEM_FAILED;
	}
	va_start(rest, flags);
	mode = va_arg(rest, unsigned int);
	value = va_arg(rest, unsigned int);
	va_end(rest);
	return real(name, flags, mode, value);
}
