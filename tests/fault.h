/* Every libc call of gemma2.c and run.c that can fail, made to go through tests/fault.c: force it
 * into both with -include.  Macros with arguments, so that (malloc)(n) still means libc's. */
#ifndef FAULT_H
#define FAULT_H
#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

void *fault_malloc(size_t n);
void *fault_calloc(size_t n, size_t size);
void *fault_realloc(void *p, size_t n);
void fault_free(void *p);
void *fault_mmap(void *at, size_t n, int protection, int flags, int fd, off_t offset);
int fault_munmap(void *p, size_t n);
int fault_open(const char *path, int flags, mode_t mode, ...);
int fault_close(int fd);
int fault_fstat(int fd, struct stat *st);
ssize_t fault_read(int fd, void *to, size_t n);
ssize_t fault_write(int fd, const void *from, size_t n);
int fault_fsync(int fd);
int fault_rename(const char *from, const char *to);
int fault_mkstemp(char *path);
char *fault_realpath(const char *path, char *to);
FILE *fault_fopen(const char *path, const char *mode);
FILE *fault_fdopen(int fd, const char *mode);
int fault_fclose(FILE *f);
size_t fault_fread(void *to, size_t size, size_t n, FILE *f);
size_t fault_fwrite(const void *from, size_t size, size_t n, FILE *f);
int fault_ferror(FILE *f);
int fault_getc(FILE *f);
int fault_fflush(FILE *f);
int fault_vfprintf(FILE *f, const char *format, va_list arguments);
int fault_isatty(int fd);
int fault_poll(struct pollfd *files, nfds_t n, int milliseconds);

#define malloc(n) fault_malloc(n)
#define calloc(n, size) fault_calloc(n, size)
#define realloc(p, n) fault_realloc(p, n)
#define free(p) fault_free(p)
#define mmap(at, n, protection, flags, fd, offset) \
    fault_mmap(at, n, protection, flags, fd, offset)
#define munmap(p, n) fault_munmap(p, n)
#define open(...) fault_open(__VA_ARGS__, 0)
#define close(fd) fault_close(fd)
#define fstat(fd, st) fault_fstat(fd, st)
#define read(fd, to, n) fault_read(fd, to, n)
#define write(fd, from, n) fault_write(fd, from, n)
#define fsync(fd) fault_fsync(fd)
#define rename(from, to) fault_rename(from, to)
#define mkstemp(path) fault_mkstemp(path)
#define realpath(path, to) fault_realpath(path, to)
#define fopen(path, mode) fault_fopen(path, mode)
#define fdopen(fd, mode) fault_fdopen(fd, mode)
#define fclose(f) fault_fclose(f)
#define fread(to, size, n, f) fault_fread(to, size, n, f)
#define fwrite(from, size, n, f) fault_fwrite(from, size, n, f)
#undef ferror
#define ferror(f) fault_ferror(f)
#undef getc
#define getc(f) fault_getc(f)
#define fflush(f) fault_fflush(f)
#define vfprintf(f, format, arguments) fault_vfprintf(f, format, arguments)
#define isatty(fd) fault_isatty(fd)
#define poll(files, n, milliseconds) fault_poll(files, n, milliseconds)
#endif
