/* metrics_test.c: the exposition text, byte for byte. */
#include "common/base/metrics.h"

#include "check.h"
#include "common/base/json.h"

static const double bounds[] = {0.001, 0.5, 1, 10};

static char *text(struct metrics *m, struct json_out *out)
{
    out->len = 0;
    metrics_write(m, out);
    json_out_raw(out, "", 1);
    return out->data;
}

static void families_and_series_are_written(void)
{
    struct metrics *m = metrics_create();
    struct json_out out = {0};
    struct metric *a = metrics_get(m, METRIC_COUNTER, "baton_requests_total", "Requests.",
                                   "code=\"200\"", NULL, 0);
    struct metric *g =
        metrics_get(m, METRIC_GAUGE, "baton_pages", "Pages\nand \\ more.", "", NULL, 0);
    struct metric *b = metrics_get(m, METRIC_COUNTER, "baton_requests_total", "Requests.",
                                   "code=\"500\"", NULL, 0);
    metric_add(a, 1);
    metric_add(a, 2);
    metric_set(b, 4503599627370496.0);
    metric_set(g, -0.25);
    CHECK_STR(text(m, &out), "# HELP baton_requests_total Requests.\n"
                             "# TYPE baton_requests_total counter\n"
                             "baton_requests_total{code=\"200\"} 3\n"
                             "baton_requests_total{code=\"500\"} 4503599627370496\n"
                             "# HELP baton_pages Pages\\nand \\\\ more.\n"
                             "# TYPE baton_pages gauge\n"
                             "baton_pages -0.25\n");
    CHECK_NEAR(metric_value(a), 3, 0);
    json_out_finish(&out);
    metrics_destroy(m);
}

static void histograms_are_cumulative(void)
{
    struct metrics *m = metrics_create();
    struct json_out out = {0};
    struct metric *h = metrics_get(m, METRIC_HISTOGRAM, "ttft", "TTFT.", "role=\"a\"", bounds, 4);
    metric_observe(h, 0.0005);
    metric_observe(h, 0.5); // bounds are inclusive
    metric_observe(h, 0.75);
    metric_observe(h, 64);
    metric_observe(h, NAN);
    CHECK_STR(text(m, &out), "# HELP ttft TTFT.\n"
                             "# TYPE ttft histogram\n"
                             "ttft_bucket{role=\"a\",le=\"0.001\"} 1\n"
                             "ttft_bucket{role=\"a\",le=\"0.5\"} 2\n"
                             "ttft_bucket{role=\"a\",le=\"1\"} 3\n"
                             "ttft_bucket{role=\"a\",le=\"10\"} 3\n"
                             "ttft_bucket{role=\"a\",le=\"+Inf\"} 4\n"
                             "ttft_sum{role=\"a\"} 65.2505\n"
                             "ttft_count{role=\"a\"} 4\n");
    CHECK_NEAR(metric_value(h), 4, 0);
    json_out_finish(&out);
    metrics_destroy(m);
}

static void histograms_without_labels(void)
{
    struct metrics *m = metrics_create();
    struct json_out out = {0};
    metrics_get(m, METRIC_HISTOGRAM, "x", "X.", "", bounds, 1);
    CHECK_STR(text(m, &out), "# HELP x X.\n# TYPE x histogram\nx_bucket{le=\"0.001\"} 0\n"
                             "x_bucket{le=\"+Inf\"} 0\nx_sum 0\nx_count 0\n");
    json_out_finish(&out);
    metrics_destroy(m);
}

static void series_are_found_again_and_removed(void)
{
    struct metrics *m = metrics_create();
    struct json_out out = {0};
    struct metric *a = metrics_get(m, METRIC_GAUGE, "g", "G.", "w=\"0\"", NULL, 0);
    struct metric *b = metrics_get(m, METRIC_GAUGE, "g", "G.", "w=\"1\"", NULL, 0);
    CHECK(a && b && a != b);
    CHECK(metrics_get(m, METRIC_GAUGE, "g", "G.", "w=\"0\"", NULL, 0) == a);
    CHECK(!metrics_get(m, METRIC_COUNTER, "g", "G.", "", NULL, 0)); // one name, one type
    metrics_remove(m, b);
    metrics_remove(m, NULL);
    b = metrics_get(m, METRIC_GAUGE, "g", "G.", "w=\"2\"", NULL, 0); // the list's end is whole
    CHECK_STR(text(m, &out), "# HELP g G.\n# TYPE g gauge\ng{w=\"0\"} 0\ng{w=\"2\"} 0\n");
    metrics_remove(m, a);
    metrics_remove(m, b);
    CHECK_STR(text(m, &out), "");
    json_out_finish(&out);
    metrics_destroy(m);
}

static void nothing_is_survived(void)
{
    metric_add(NULL, 1);
    metric_set(NULL, 1);
    metric_observe(NULL, 1);
    CHECK_NEAR(metric_value(NULL), 0, 0);
    CHECK(!metrics_get(NULL, METRIC_GAUGE, "g", "G.", "", NULL, 0));
    metrics_destroy(NULL);
}

static void windows_show_what_is_new(void)
{
    struct metrics *m = metrics_create();
    struct metric *h = metrics_get(m, METRIC_HISTOGRAM, "ttft", "TTFT.", "", bounds, 4);
    struct metric_window w = {0};
    metric_window_move(&w, h);
    CHECK(w.n == 0 && isnan(metric_window_quantile(&w, h, 0.5)));
    for (int i = 0; i < 90; i++)
        metric_observe(h, 0.75);
    for (int i = 0; i < 10; i++)
        metric_observe(h, 5);
    metric_window_move(&w, h);
    CHECK(w.n == 100);
    CHECK_NEAR(w.sum, 90 * 0.75 + 50, 1e-9);
    CHECK_NEAR(metric_window_quantile(&w, h, 0.45), 0.75, 1e-9); // the middle of 0.5 .. 1
    CHECK_NEAR(metric_window_quantile(&w, h, 0.9), 1, 1e-9);
    CHECK_NEAR(metric_window_quantile(&w, h, 0.95), 5.5, 1e-9); // the middle of 1 .. 10
    metric_observe(h, 64);
    struct metric *other = metrics_get(m, METRIC_HISTOGRAM, "old", "Old.", "", bounds, 4);
    struct metric_window all = {0};
    metric_mirror(other, h);
    metric_window_move(&all, other);
    CHECK(all.n == 101 && all.in[2] == 90 && all.in[3] == 10 && all.in[4] == 1);
    CHECK_NEAR(all.sum, 90 * 0.75 + 50 + 64, 1e-9);
    metric_window_move(&w, h);
    CHECK(w.n == 1);
    CHECK_NEAR(w.sum, 64, 1e-9);
    CHECK_NEAR(metric_window_quantile(&w, h, 0.5), 10, 0); // above the last bound
    metric_window_move(&w, h);
    CHECK(w.n == 0);
    metric_window_move(&w, NULL);
    CHECK(isnan(metric_window_quantile(&w, NULL, 0.5)));
    metrics_destroy(m);
}

int main(void)
{
    RUN(families_and_series_are_written);
    RUN(histograms_are_cumulative);
    RUN(histograms_without_labels);
    RUN(series_are_found_again_and_removed);
    RUN(windows_show_what_is_new);
    RUN(nothing_is_survived);
    return check_done();
}
