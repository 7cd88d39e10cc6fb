/* A layer between a process and its file system, loaded by LD_PRELOAD: it numbers every change below one folder, and at a given
   one kills the process, or lets that one or all from there on fail, or takes its time. Every change is noted in a journal with
   its bytes, from which journal.py makes the states that a power cut may leave.

   cc -O1 -shared -fPIC -o layer.so layer.c -ldl

   Linux and glibc. It sees calls through libc's own names, so those of Python, of Rust's and of C++'s standard libraries. What it
   does not see (a writable memory map, a program's own system calls) shows: the journal's end state is compared with the folder.

   What is noted, one letter each (see journal.py):
     C a new file        O a file opened for writing    W bytes written      T a length set        M a writable memory map
     D a new folder      U a file removed               X a folder removed   R a new name          L a second name, or a link
     F a file synced     G a folder synced */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <ucontext.h>
#include <unistd.h>

typedef void (*seen_t)(long event, int kind, const char *path);

static struct {
    char root[PATH_MAX];
    size_t length;
    int journal;
    long kill_at, fail_from, fail_until, slow;
    int share, error;
    char failing[32]; /* the kinds of events that fail */
    seen_t seen;
} s;
static int active;
static long events;
static __thread int inside; /* what the layer itself does is not seen */
static pthread_mutex_t mutex = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;

static struct { dev_t dev; ino_t ino; int object; char path[PATH_MAX]; } *files;
static int count, room, objects;

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static void trap_renames(void);

/* Begin: `kill_at`, `fail_from` and `fail_until` are numbers of events, from 1, or 0. Of a write that is hit, `share` / 256 is
   done. Events fail with `error` if their letter is in `failing`. `slow` is the microseconds that each event waits. */
void soak_begin(const char *root, int journal, long kill_at, long fail_from, long fail_until, int error, const char *failing,
                int share, long slow, seen_t seen)
{
    snprintf(s.root, sizeof s.root, "%s", root);
    snprintf(s.failing, sizeof s.failing, "%s", failing);
    s.length = strlen(root);
    s.journal = journal, s.kill_at = kill_at, s.fail_from = fail_from, s.fail_until = fail_until;
    s.error = error, s.share = share, s.slow = slow, s.seen = seen;
    trap_renames();
    active = 1;
}

typedef long (*syscall_t)(long, ...);

static syscall_t raw(void)
{
    static syscall_t real;
    if (!real) real = (syscall_t)dlsym(RTLD_NEXT, "syscall");
    return real;
}

static void die(void)
{
    for (;;) raw()(SYS_kill, (long)getpid(), (long)SIGKILL);
}

/* Append one record to the journal. */
static void note(int kind, int object, const char *path, const char *other, int64_t at, const void *data, size_t length)
{
    struct { int64_t event, at, length; int32_t kind, object; uint32_t path, other; } head = {
        events, at, (int64_t)length, kind, object, (uint32_t)strlen(path), (uint32_t)strlen(other)};
    struct iovec parts[4] = {{&head, sizeof head}, {(void *)path, head.path}, {(void *)other, head.other}, {(void *)data, data ? length : 0}};
    size_t all = sizeof head + head.path + head.other + (data ? length : 0);
    if (raw()(SYS_writev, (long)s.journal, parts, 4L) != (long)all) abort(); /* the journal's own disk is full: no result at all */
}

/* Resolve a path to one below the root, without its last part's link; 0 if it is elsewhere. */
static int below(int folder, const char *path, char *out)
{
    if (!active || inside || !path) return 0;
    char whole[PATH_MAX], parent[PATH_MAX], link[64];
    int before = errno, found = 0;
    if (path[0] == '/') {
        snprintf(whole, sizeof whole, "%s", path);
    } else if (folder == AT_FDCWD) {
        if (!getcwd(parent, sizeof parent)) goto end;
        if (snprintf(whole, sizeof whole, "%s/%s", parent, path) >= (int)sizeof whole) goto end;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t got = readlink(link, parent, sizeof parent - 1);
        if (got < 0) goto end;
        parent[got] = 0;
        if (snprintf(whole, sizeof whole, "%s/%s", parent, path) >= (int)sizeof whole) goto end;
    }
    size_t end = strlen(whole);
    while (end > 1 && whole[end - 1] == '/') whole[--end] = 0;
    char *last = strrchr(whole, '/');
    *last = 0;
    if (!realpath(*whole ? whole : "/", parent)) goto end;
    if (snprintf(out, PATH_MAX, "%s/%s", parent, last + 1) >= PATH_MAX) goto end;
    found = !strncmp(out, s.root, s.length) && out[s.length] == '/';
end:
    errno = before;
    return found;
}

/* Return the number in `files` of an open file below the root, or -1. */
static int known(int fd)
{
    struct stat now;
    if (!active || inside || !count) return -1;
    int before = errno, bad = fstat(fd, &now) || !S_ISREG(now.st_mode);
    errno = before;
    if (bad) return -1;
    for (int i = count - 1; i >= 0; i--)
        if (files[i].ino == now.st_ino && files[i].dev == now.st_dev) return files[i].object ? i : -1;
    return -1;
}

/* Remember which file this is; `object` 0 is one elsewhere, which may have got the number of a removed one. */
static int remember(int fd, const char *path, int object)
{
    struct stat now;
    if (fstat(fd, &now)) return -1;
    if (count == room) {
        room = room ? 2 * room : 256;
        files = realloc(files, room * sizeof *files);
        if (!files) abort();
    }
    files[count].dev = now.st_dev, files[count].ino = now.st_ino, files[count].object = object;
    snprintf(files[count].path, PATH_MAX, "%s", path);
    return count++;
}

/* Count an event. Return 0 to do it, 1 if it is to be done in part, and -1, with errno, if it fails. Kills the process, unless
   a part of a write is to be done first. The mutex is held. */
static int event(int kind, const char *path, int divisible)
{
    events++;
    if (s.seen) {
        inside = 1;
        s.seen(events, kind, path);
        inside = 0;
    }
    if (s.slow) usleep((useconds_t)s.slow);
    if (events == s.kill_at) {
        if (divisible && s.share) return 1;
        die();
    }
    if (s.fail_from && events >= s.fail_from && events <= s.fail_until && strchr(s.failing, kind)) {
        if (divisible && s.share && events == s.fail_from) return 1;
        errno = s.error;
        return -1;
    }
    return 0;
}

#define LOCK pthread_mutex_lock(&mutex)
#define UNLOCK (pthread_mutex_unlock(&mutex))

/* An event that is one call with a path below the root, and is noted if it succeeds. */
#define DO(kind, path, other, call) \
    do { \
        LOCK; \
        int result_ = event(kind, path, 0) ? -1 : (int)(call); \
        if (!result_) note(kind, 0, path, other, 0, NULL, 0); \
        UNLOCK; \
        return result_; \
    } while (0)

/* -- opening */

typedef int (*open_t)(int, const char *, int, ...);

static int opened(open_t real, int folder, const char *path, int flags, mode_t mode)
{
    char place[PATH_MAX];
    struct stat there;
    if (!active || inside) return real(folder, path, flags, mode);
    if ((flags & O_TMPFILE) == O_TMPFILE) { /* a file without a name: it may fail, and leaves nothing */
        char inner[PATH_MAX];
        snprintf(inner, sizeof inner, "%s/.", path);
        if (!below(folder, inner, place)) return real(folder, path, flags, mode);
        LOCK;
        int fd = event('C', place, 0) ? -1 : real(folder, path, flags, mode);
        if (fd >= 0) remember(fd, "", ++objects), note('C', objects, "", "", 0, NULL, 0);
        UNLOCK;
        return fd;
    }
    int writes = (flags & O_ACCMODE) != O_RDONLY || flags & (O_CREAT | O_TRUNC);
    if (!writes) return real(folder, path, flags, mode);
    if (!below(folder, path, place)) {
        int fd = real(folder, path, flags, mode), before = errno;
        LOCK;
        if (fd >= 0 && count) remember(fd, "", 0);
        UNLOCK;
        errno = before;
        return fd;
    }
    LOCK;
    int before = errno, new = fstatat(AT_FDCWD, place, &there, AT_SYMLINK_NOFOLLOW) != 0;
    errno = before;
    int kind = new ? 'C' : flags & O_TRUNC ? 'T' : 'O', fd = -1;
    if (new && !(flags & O_CREAT)) { /* it fails by itself */
        UNLOCK;
        return real(folder, path, flags, mode);
    }
    if (!event(kind, place, 0)) fd = real(folder, path, flags, mode);
    if (fd >= 0) {
        int found = new ? -1 : known(fd);
        if (found < 0) found = remember(fd, place, ++objects);
        if (kind == 'T') note('O', files[found].object, place, "", 0, NULL, 0);
        note(kind, files[found].object, place, "", 0, NULL, 0);
    }
    UNLOCK;
    return fd;
}

#define MODE \
    mode_t mode = 0; \
    if (flags & (O_CREAT | O_TMPFILE)) { \
        va_list more; \
        va_start(more, flags); \
        mode = va_arg(more, mode_t); \
        va_end(more); \
    }

static int openat_(int folder, const char *path, int flags, mode_t mode)
{
    REAL(openat64);
    return opened(real, folder, path, flags, mode);
}
int open(const char *path, int flags, ...) { MODE return openat_(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE return openat_(AT_FDCWD, path, flags, mode); }
int openat(int folder, const char *path, int flags, ...) { MODE return openat_(folder, path, flags, mode); }
int openat64(int folder, const char *path, int flags, ...) { MODE return openat_(folder, path, flags, mode); }
int __open_2(const char *path, int flags) { return openat_(AT_FDCWD, path, flags, 0); }
int __open64_2(const char *path, int flags) { return openat_(AT_FDCWD, path, flags, 0); }
int __openat_2(int folder, const char *path, int flags) { return openat_(folder, path, flags, 0); }
int __openat64_2(int folder, const char *path, int flags) { return openat_(folder, path, flags, 0); }
int creat(const char *path, mode_t mode) { return openat_(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return creat(path, mode); }

/* C++'s streams open so, and then write to the file's number. */
static FILE *fopened(const char *path, const char *mode)
{
    int plus = strchr(mode, '+') != NULL, flags = plus ? O_RDWR : *mode == 'r' ? O_RDONLY : O_WRONLY;
    flags |= *mode == 'w' ? O_CREAT | O_TRUNC : *mode == 'a' ? O_CREAT | O_APPEND : 0;
    if (strchr(mode, 'x')) flags |= O_EXCL;
    if (strchr(mode, 'e')) flags |= O_CLOEXEC;
    int fd = openat_(AT_FDCWD, path, flags, 0666);
    return fd < 0 ? NULL : fdopen(fd, mode);
}
FILE *fopen(const char *path, const char *mode)
{
    char place[PATH_MAX];
    REAL(fopen);
    return strpbrk(mode, "wa+") && below(AT_FDCWD, path, place) ? fopened(path, mode) : real(path, mode);
}
FILE *fopen64(const char *path, const char *mode)
{
    char place[PATH_MAX];
    REAL(fopen64);
    return strpbrk(mode, "wa+") && below(AT_FDCWD, path, place) ? fopened(path, mode) : real(path, mode);
}

/* -- writing */

static ssize_t put(int fd, int file, const char *data, size_t length, off_t at)
{
    ssize_t done = -1;
    LOCK;
    int hit = event('W', files[file].path, 1);
    if (hit >= 0) {
        size_t some = hit ? length * (size_t)s.share / 256 : length;
        if (some || !length) done = at < 0 ? raw()(SYS_write, (long)fd, data, some) : raw()(SYS_pwrite64, (long)fd, data, some, at);
        else done = 0;
        if (done > 0) {
            int64_t start = at < 0 ? lseek(fd, 0, SEEK_CUR) - done : at;
            note('W', files[file].object, "", "", start, data, (size_t)done);
        }
        if (events == s.kill_at) die();
        if (hit && !done) errno = s.error, done = -1;
    }
    UNLOCK;
    return done;
}

static ssize_t putv(int fd, int file, const struct iovec *parts, int number, off_t at)
{
    size_t length = 0, done = 0;
    for (int i = 0; i < number; i++) length += parts[i].iov_len;
    char *all = malloc(length ? length : 1);
    if (!all) abort();
    for (int i = 0; i < number; done += parts[i++].iov_len) memcpy(all + done, parts[i].iov_base, parts[i].iov_len);
    ssize_t got = put(fd, file, all, length, at);
    int before = errno;
    free(all);
    errno = before;
    return got;
}

ssize_t write(int fd, const void *data, size_t length)
{
    REAL(write);
    int file = known(fd);
    return file < 0 ? real(fd, data, length) : put(fd, file, data, length, -1);
}
ssize_t pwrite(int fd, const void *data, size_t length, off_t at)
{
    REAL(pwrite);
    int file = known(fd);
    return file < 0 ? real(fd, data, length, at) : put(fd, file, data, length, at);
}
ssize_t pwrite64(int fd, const void *data, size_t length, off64_t at) { return pwrite(fd, data, length, at); }
ssize_t writev(int fd, const struct iovec *parts, int number)
{
    REAL(writev);
    int file = known(fd);
    return file < 0 ? real(fd, parts, number) : putv(fd, file, parts, number, -1);
}
ssize_t pwritev(int fd, const struct iovec *parts, int number, off_t at)
{
    REAL(pwritev);
    int file = known(fd);
    return file < 0 ? real(fd, parts, number, at) : putv(fd, file, parts, number, at);
}
ssize_t pwritev64(int fd, const struct iovec *parts, int number, off64_t at) { return pwritev(fd, parts, number, at); }

/* C's own streams, without their buffers: numpy writes arrays so. */
size_t fwrite(const void *data, size_t size, size_t number, FILE *stream)
{
    REAL(fwrite);
    size_t length = size * number, done = 0;
    int fd = fileno(stream), file = fd < 0 ? -1 : known(fd);
    if (file < 0 || !length) return real(data, size, number, stream);
    if (fflush(stream)) return 0;
    while (done < length) {
        ssize_t some = put(fd, file, (const char *)data + done, length - done, -1);
        if (some <= 0) break;
        done += (size_t)some;
    }
    int before = errno;
    fseeko(stream, lseek(fd, 0, SEEK_CUR), SEEK_SET); /* the stream remembers where it was */
    errno = before;
    return done / size;
}

/* These copy within the kernel: refused, so that their callers read and write instead. */
ssize_t sendfile64(int out, int in, off64_t *at, size_t length)
{
    REAL(sendfile64);
    if (known(out) < 0) return real(out, in, at, length);
    errno = ENOSYS;
    return -1;
}
ssize_t sendfile(int out, int in, off_t *at, size_t length) { return sendfile64(out, in, at, length); }
ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t length, unsigned flags)
{
    REAL(copy_file_range);
    if (known(out) < 0) return real(in, from, out, to, length, flags);
    errno = ENOSYS;
    return -1;
}

int ftruncate64(int fd, off64_t length)
{
    REAL(ftruncate64);
    int file = known(fd);
    if (file < 0) return real(fd, length);
    LOCK;
    int result = event('T', files[file].path, 0) ? -1 : real(fd, length);
    if (!result) note('T', files[file].object, "", "", length, NULL, 0);
    UNLOCK;
    return result;
}
int ftruncate(int fd, off_t length) { return ftruncate64(fd, length); }
int truncate64(const char *path, off64_t length)
{
    char place[PATH_MAX];
    REAL(truncate64);
    if (!below(AT_FDCWD, path, place)) return real(path, length);
    inside = 1;
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    inside = 0;
    if (fd < 0) return -1;
    LOCK;
    int file = known(fd);
    if (file < 0) remember(fd, place, ++objects), note('O', objects, place, "", 0, NULL, 0);
    int result = ftruncate64(fd, length), before = errno;
    UNLOCK;
    close(fd);
    errno = before;
    return result;
}
int truncate(const char *path, off_t length) { return truncate64(path, length); }
int posix_fallocate64(int fd, off64_t at, off64_t length)
{
    REAL(posix_fallocate64);
    struct stat now;
    if (known(fd) < 0) return real(fd, at, length);
    if (fstat(fd, &now)) return errno;
    return at + length <= now.st_size || !ftruncate64(fd, at + length) ? 0 : errno;
}
int posix_fallocate(int fd, off_t at, off_t length) { return posix_fallocate64(fd, at, length); }
int fallocate64(int fd, int mode, off64_t at, off64_t length)
{
    REAL(fallocate64);
    if (known(fd) < 0) return real(fd, mode, at, length);
    errno = EOPNOTSUPP;
    return -1;
}
int fallocate(int fd, int mode, off_t at, off_t length) { return fallocate64(fd, mode, at, length); }
void *mmap64(void *where, size_t length, int protection, int flags, int fd, off64_t at)
{
    REAL(mmap64);
    int file = fd >= 0 && flags & MAP_SHARED && protection & PROT_WRITE ? known(fd) : -1;
    if (file < 0) return real(where, length, protection, flags, fd, at);
    LOCK;
    void *got = event('M', files[file].path, 0) ? MAP_FAILED : real(where, length, protection, flags, fd, at);
    if (got != MAP_FAILED) note('M', files[file].object, files[file].path, "", at, NULL, 0);
    UNLOCK;
    return got;
}
void *mmap(void *where, size_t length, int protection, int flags, int fd, off_t at)
{
    return mmap64(where, length, protection, flags, fd, at);
}

/* -- syncing */

static int synced(int fd, int (*real)(int))
{
    struct stat now;
    char link[64], where[PATH_MAX], place[PATH_MAX];
    int file = known(fd), before = errno;
    if (file >= 0) {
        LOCK;
        int result = event('F', files[file].path, 0) ? -1 : real(fd);
        if (!result) note('F', files[file].object, "", "", 0, NULL, 0);
        UNLOCK;
        return result;
    }
    if (!active || inside || fstat(fd, &now) || !S_ISDIR(now.st_mode)) return errno = before, real(fd);
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t got = readlink(link, where, sizeof where - 1);
    errno = before;
    if (got < 0) return real(fd);
    where[got] = 0;
    if (strcmp(where, s.root) && !below(AT_FDCWD, where, place)) return real(fd);
    DO('G', where, "", real(fd));
}
int fsync(int fd)
{
    REAL(fsync);
    return synced(fd, real);
}
int fdatasync(int fd)
{
    REAL(fdatasync);
    return synced(fd, real);
}

/* -- names */

enum { OURS = 0x4c495445 }; /* the last argument of the layer's own renames */

static long really_rename(int from, const char *old, int to, const char *new, unsigned flags)
{
    return raw()(SYS_renameat2, (long)from, old, (long)to, new, (long)flags, (long)OURS);
}

static int renamed(int from, const char *old, int to, const char *new, unsigned flags)
{
    char one[PATH_MAX], other[PATH_MAX];
    int seen = below(from, old, one), there = below(to, new, other);
    if (!seen || !there) return (int)really_rename(from, old, to, new, flags); /* across the root: the end state shows it */
    DO('R', one, other, really_rename(from, old, to, new, flags));
}
int rename(const char *old, const char *new) { return renamed(AT_FDCWD, old, AT_FDCWD, new, 0); }
int renameat(int from, const char *old, int to, const char *new) { return renamed(from, old, to, new, 0); }
int renameat2(int from, const char *old, int to, const char *new, unsigned flags) { return renamed(from, old, to, new, flags); }

int linkat(int from, const char *old, int to, const char *new, int flags)
{
    char one[PATH_MAX], other[PATH_MAX];
    int seen = below(from, old, one), there = below(to, new, other);
    REAL(linkat);
    if (!there) return real(from, old, to, new, flags);
    DO('L', seen ? one : old, other, real(from, old, to, new, flags));
}
int link(const char *old, const char *new) { return linkat(AT_FDCWD, old, AT_FDCWD, new, 0); }
int symlinkat(const char *content, int folder, const char *path)
{
    char place[PATH_MAX];
    REAL(symlinkat);
    if (!below(folder, path, place)) return real(content, folder, path);
    DO('L', content, place, real(content, folder, path));
}
int symlink(const char *content, const char *path) { return symlinkat(content, AT_FDCWD, path); }

int unlinkat(int folder, const char *path, int flags)
{
    char place[PATH_MAX];
    REAL(unlinkat);
    if (!below(folder, path, place)) return real(folder, path, flags);
    DO(flags & AT_REMOVEDIR ? 'X' : 'U', place, "", real(folder, path, flags));
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }
int remove(const char *path)
{
    int result = unlink(path);
    return result && errno == EISDIR ? rmdir(path) : result;
}
int mkdirat(int folder, const char *path, mode_t mode)
{
    char place[PATH_MAX];
    REAL(mkdirat);
    if (!below(folder, path, place)) return real(folder, path, mode);
    DO('D', place, "", real(folder, path, mode));
}
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

/* -- renames by the system call itself, as Rust's tempfile makes them for safetensors: the kernel hands them back */

#if defined(__x86_64__)
#define ARGUMENT(c, i) ((long)(c)->uc_mcontext.gregs[(int[]){REG_RDI, REG_RSI, REG_RDX, REG_R10, REG_R8}[i]])
#define RESULT(c) ((c)->uc_mcontext.gregs[REG_RAX])
#elif defined(__aarch64__)
#define ARGUMENT(c, i) ((long)(c)->uc_mcontext.regs[i])
#define RESULT(c) ((c)->uc_mcontext.regs[0])
#else
#error "this layer knows the registers of x86-64 and ARM64 only"
#endif

static void trapped(int number, siginfo_t *info, void *context)
{
    ucontext_t *c = context;
    int before = errno, result = -1;
    (void)number;
#ifdef SYS_rename
    if (info->si_syscall == SYS_rename) result = renamed(AT_FDCWD, (char *)ARGUMENT(c, 0), AT_FDCWD, (char *)ARGUMENT(c, 1), 0);
    else
#endif
        result = renamed((int)ARGUMENT(c, 0), (char *)ARGUMENT(c, 1), (int)ARGUMENT(c, 2), (char *)ARGUMENT(c, 3),
                         info->si_syscall == SYS_renameat2 ? (unsigned)ARGUMENT(c, 4) : 0);
    RESULT(c) = result ? -errno : 0;
    errno = before;
}

/* Also in a program that is started from the process: the filter goes on to it. */
__attribute__((constructor)) static void listen(void)
{
    struct sigaction action = {.sa_sigaction = trapped, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigaction(SIGSYS, &action, NULL);
}

static void trap_renames(void)
{
    struct sock_filter steps[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
#ifdef SYS_rename
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_rename, 4, 0),
#else
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_renameat, 4, 0),
#endif
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_renameat, 3, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_renameat2, 0, 3),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[5])),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, OURS, 1, 0),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog filter = {sizeof steps / sizeof *steps, steps};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter)) {
        fprintf(stderr, "layer.c: this system lets no process filter its own calls\n");
        _exit(71);
    }
}
