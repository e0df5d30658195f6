/* gpus_test.c: against fake_nvml.c, which the loader finds by LD_LIBRARY_PATH. */
#include "deploy/gpus.h"

#include "check.h"

#define FOUR "90,80,79,0,0;90,80,40,3,0;80,40,40,0,1;90,141,140,2,9"

static struct gpus g;

static void describes_every_gpu(void)
{
    setenv("FAKE_GPUS", FOUR, 1);
    setenv("FAKE_CUDA", "12080", 1);
    CHECK_OK(gpus_read(NULL, &g));
    CHECK_INT(g.n, 4);
    CHECK_STR(g.driver, "999.1");
    CHECK_INT(g.cuda_version, 12080);
    CHECK_STR(g.gpu[1].name, "Fake 1");
    CHECK_STR(g.gpu[1].bus_id, "0001:11:00.0");
    CHECK_INT(g.gpu[0].total_bytes >> 30, 80);
    CHECK_INT(g.gpu[0].free_bytes >> 30, 79);
    CHECK_INT(g.gpu[2].cc_major, 8);
    CHECK_INT(g.gpu[2].cc_minor, 0);
    CHECK(g.gpu[1].is_exclusive && !g.gpu[0].is_exclusive);
    CHECK(g.gpu[3].is_prohibited && !g.gpu[1].is_prohibited);
    CHECK(g.gpu[2].is_mig);
    CHECK(!g.gpu[3].is_mig); // it does not know the question
}

static void tells_paths(void)
{
    static const struct {
        const char *links;
        enum gpu_path path;
    } cases[] = {{"nvlink", GPU_PATH_NVLINK}, {"pcie", GPU_PATH_PCIE}, {"none", GPU_PATH_NONE}};
    for (int i = 0; i < 3; i++) {
        setenv("FAKE_LINKS", cases[i].links, 1);
        CHECK_OK(gpus_read(NULL, &g));
        CHECK_INT(g.path[0][1], cases[i].path);
        CHECK_INT(g.path[2][2], GPU_PATH_NVLINK);
    }
    unsetenv("FAKE_LINKS");
}

static void follows_visible_devices(void)
{
    static const struct {
        const char *visible, *names;
    } cases[] = {
        {"2,0", "Fake 2 Fake 0 "},
        {"3", "Fake 3 "},
        {"GPU-01ab", "Fake 1 "},
        {"gpu-03abcdef, 1", "Fake 3 Fake 1 "},
        {"0,7,1", "Fake 0 "},
        {"0,-1,1", "Fake 0 "},
        {"", ""},
        {"GPU-", ""},
        {"1x", ""},
        {"99999999999999999999", ""},
        {"NoDevFiles", ""},
        {"1,1", "Fake 1 Fake 1 "},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char names[256] = "";
        CHECK_OK(gpus_read(cases[i].visible, &g));
        for (size_t k = 0; k < g.n; k++)
            sprintf(names + strlen(names), "%s ", g.gpu[k].name);
        CHECK_STR(names, cases[i].names);
    }
}

static void says_why_there_are_none(void)
{
    setenv("FAKE_ERROR", "9", 1);
    CHECK_INT(gpus_read(NULL, &g), ERR_IO);
    CHECK(strstr(err_text(ERR_IO), "Driver Not Loaded"));
    unsetenv("FAKE_ERROR");
    setenv("FAKE_GPUS", "", 1);
    CHECK_OK(gpus_read(NULL, &g));
    CHECK_INT(g.n, 0);
}

int main(void)
{
    RUN(describes_every_gpu);
    RUN(tells_paths);
    RUN(follows_visible_devices);
    RUN(says_why_there_are_none);
    return check_done();
}
