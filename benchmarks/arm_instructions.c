/* A plugin for qemu-user (7.x) that counts the AArch64 instructions a program executes, by kind.
 *
 * The program asks for the counts since it last asked by the system call lseek(-77, 0, 0), which does nothing else; they
 * are written to standard error as a line of JSON. Debian ships neither a plugin nor the header, so the few functions of
 * the emulator's plugin interface, version 1, are declared here.
 */
#include <stdint.h>
#include <stdio.h>
#include <string.h>

struct qemu_plugin_tb;
struct qemu_plugin_insn;
typedef uint64_t id_t_;
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *block);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *block, size_t index);
const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *instruction);
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *block, int add, void *counter, uint64_t amount);
void qemu_plugin_register_vcpu_tb_trans_cb(id_t_ id, void (*translated)(id_t_, struct qemu_plugin_tb *));
void qemu_plugin_register_vcpu_syscall_cb(id_t_ id, void (*called)(id_t_, unsigned, int64_t, uint64_t, uint64_t,
    uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t));

#define EXPORT __attribute__((visibility("default")))
EXPORT int qemu_plugin_version = 1;

/* Encodings of the Arm Architecture Reference Manual, "Advanced SIMD": vector form, then by-element form. */
static const struct { const char *name; uint32_t mask, value; } kinds[] = {
    { "float_multiply_add", 0xbfa0fc00, 0x0e20cc00 }, { "float_multiply_add", 0xbf80f400, 0x0f801000 },
    { "dot_product", 0x9fe0fc00, 0x0e809400 },        { "dot_product", 0x9fc0f400, 0x0f80e000 },
    { "matrix_product", 0xdfe0fc00, 0x4e80a400 },
    { "long_multiply_add", 0x9f20fc00, 0x0e208000 },  { "long_multiply_add", 0x9f00f400, 0x0f002000 },
    { "half_multiply_add", 0xbfe0fc00, 0x0e400c00 },  { "half_multiply_add", 0xbfc0f400, 0x0f001000 },
    { "long_multiply", 0x9f20fc00, 0x0e20c000 },      { "long_multiply", 0x9f00f400, 0x0f00a000 },
    { "load_store", 0x0a000000, 0x08000000 },
};
enum { KINDS = sizeof kinds / sizeof *kinds };
static uint64_t total, counts[KINDS];

static void on_translation(id_t_ id, struct qemu_plugin_tb *block)
{
    uint64_t found[KINDS] = { 0 };
    size_t length = qemu_plugin_tb_n_insns(block);
    (void)id;
    for (size_t i = 0; i < length; i++) {
        uint32_t word;
        memcpy(&word, qemu_plugin_insn_data(qemu_plugin_tb_get_insn(block, i)), sizeof word);
        for (int kind = 0; kind < KINDS; kind++)
            if ((word & kinds[kind].mask) == kinds[kind].value) {
                found[kind]++;
                break;
            }
    }
    qemu_plugin_register_vcpu_tb_exec_inline(block, 0, &total, length);
    for (int kind = 0; kind < KINDS; kind++)
        if (found[kind])
            qemu_plugin_register_vcpu_tb_exec_inline(block, 0, &counts[kind], found[kind]);
}

static void on_call(id_t_ id, unsigned cpu, int64_t number, uint64_t file, uint64_t b, uint64_t c, uint64_t d, uint64_t e,
    uint64_t f, uint64_t g, uint64_t h)
{
    (void)id, (void)cpu, (void)b, (void)c, (void)d, (void)e, (void)f, (void)g, (void)h;
    if (number != 62 /* lseek */ || (int32_t)file != -77)
        return;
    fprintf(stderr, "{\"total\": %llu", (unsigned long long)total);
    for (int kind = 0; kind < KINDS; kind++) {
        uint64_t sum = counts[kind];
        int last = kind + 1 == KINDS || strcmp(kinds[kind].name, kinds[kind + 1].name) != 0;
        if (!last) {
            counts[kind + 1] += sum;
        } else {
            fprintf(stderr, ", \"%s\": %llu", kinds[kind].name, (unsigned long long)sum);
        }
        counts[kind] = 0;
    }
    fprintf(stderr, "}\n");
    total = 0;
}

EXPORT int qemu_plugin_install(id_t_ id, const void *info, int count, char **arguments)
{
    (void)info, (void)count, (void)arguments;
    qemu_plugin_register_vcpu_tb_trans_cb(id, on_translation);
    qemu_plugin_register_vcpu_syscall_cb(id, on_call);
    return 0;
}
