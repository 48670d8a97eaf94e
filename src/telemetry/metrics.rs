use std::fs;
use std::time::Duration;

use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder};
use metrics_util::MetricKindMask;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeVal;

use super::catalogue;

/// What `/metrics` answers.
#[derive(Clone, Debug)]
pub struct Metrics(PrometheusHandle);

#[derive(Clone, Debug)]
pub struct MetricsSettings {
    /// Counters and histograms that nothing has moved for this long are left out until they move again (from zero).
    /// Gauges stay: their labels are few.
    pub idle_timeout: Duration,
}

impl Default for MetricsSettings {
    fn default() -> Self {
        Self { idle_timeout: Duration::from_secs(15 * 60) }
    }
}

impl Metrics {
    /// Makes the recorder that all of this process's metrics go to, and describes those that every agent has.
    pub fn install(settings: &MetricsSettings) -> Result<Self, MetricsError> {
        let recorder = recorder(settings)?;
        let handle = recorder.handle();
        metrics::set_global_recorder(recorder).map_err(|_| MetricsError::Installed)?;
        super::describe_metrics();
        metrics::gauge!("selvedge_build_info", "version" => env!("CARGO_PKG_VERSION")).set(1.0);
        Ok(Self(handle))
    }

    /// Of a recorder that nothing is sent to.
    #[cfg(test)]
    pub(crate) fn detached() -> Self {
        let recorder = recorder(&MetricsSettings::default()).expect("the buckets are constants");
        metrics::with_local_recorder(&recorder, || metrics::gauge!("selvedge_build_info").set(1.0));
        Self(recorder.handle())
    }

    /// Prometheus text, version 0.0.4. A gauge that was set to NaN is left out: that is how a room takes one back.
    pub fn render(&self) -> String {
        measure_process();
        without_nan(&self.0.render())
    }

    /// Empties the buffers of histograms, and lets idle series expire also where nobody scrapes. Runs until dropped.
    pub async fn upkeep(self) {
        let mut ticks = tokio::time::interval(UPKEEP);
        for tick in 0_u32.. {
            ticks.tick().await;
            self.0.run_upkeep();
            if tick % 12 == 0 {
                // Known for the whole life of the worker, and so never idle.
                crate::handover::record_restarts();
                // Series expire by being rendered. Writing to nowhere cannot fail.
                let _ = self.0.render_to_write(&mut std::io::sink());
            }
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    #[error("the metrics of this process go to another recorder already")]
    Installed,
    #[error("the histogram buckets are refused")]
    Buckets(#[from] metrics_exporter_prometheus::BuildError),
}

pub(super) fn recorder(settings: &MetricsSettings) -> Result<PrometheusRecorder, MetricsError> {
    Ok(PrometheusBuilder::new()
        .idle_timeout(MetricKindMask::COUNTER | MetricKindMask::HISTOGRAM, Some(settings.idle_timeout))
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &SECONDS)?
        .set_buckets_for_metric(Matcher::Suffix("_bytes".to_owned()), &BYTES)?
        .build_recorder())
}

fn without_nan(text: &str) -> String {
    text.split_inclusive('\n').filter(|line| !line.ends_with(" NaN\n")).collect()
}

// Cheap enough for every scrape: one directory read and one small file.
fn measure_process() {
    if let Ok(descriptors) = fs::read_dir("/proc/self/fd") {
        metrics::gauge!(catalogue::OPEN_FDS).set(descriptors.count() as f64);
    }
    let resident = fs::read_to_string("/proc/self/statm")
        .ok()
        .and_then(|text| text.split(' ').nth(1)?.parse::<u64>().ok())
        .zip(nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok().flatten());
    if let Some((pages, page)) = resident {
        metrics::gauge!(catalogue::RESIDENT_MEMORY).set(pages as f64 * page as f64);
    }
    if let Ok(usage) = getrusage(UsageWho::RUSAGE_SELF) {
        let seconds = |time: TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
        metrics::gauge!(catalogue::CPU_TIME).set(seconds(usage.user_time()) + seconds(usage.system_time()));
    }
}

const UPKEEP: Duration = Duration::from_secs(5);
const SECONDS: [f64; 14] =
    [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 10.0];
const BYTES: [f64; 8] = [64.0, 512.0, 4096.0, 32_768.0, 262_144.0, 2_097_152.0, 16_777_216.0, 134_217_728.0];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_that_rest_expire_and_gauges_stay() {
        let recorder = recorder(&MetricsSettings { idle_timeout: Duration::from_millis(1) }).unwrap();
        let handle = recorder.handle();
        metrics::with_local_recorder(&recorder, || {
            metrics::counter!("selvedge_rest_total").increment(1);
            metrics::gauge!("selvedge_stay").set(1.0);
        });
        assert!(handle.render().contains("selvedge_rest_total 1"));
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        while handle.render().contains("selvedge_rest_total 1") {
            assert!(std::time::Instant::now() < deadline, "an idle series did not expire");
            std::thread::yield_now();
        }
        assert!(handle.render().contains("selvedge_stay 1"));
    }

    #[test]
    fn a_gauge_that_was_taken_back_is_left_out() {
        let recorder = recorder(&MetricsSettings::default()).unwrap();
        metrics::with_local_recorder(&recorder, || {
            metrics::gauge!("selvedge_gone", "identity" => "one").set(f64::NAN);
            metrics::gauge!("selvedge_gone", "identity" => "two").set(2.0);
        });
        let text = without_nan(&recorder.handle().render());
        let series: Vec<&str> = text.lines().filter(|line| line.starts_with("selvedge_")).collect();
        assert_eq!(series, ["selvedge_gone{identity=\"two\"} 2"], "{text}");
    }

    #[test]
    fn seconds_are_histograms_with_buckets_fit_for_a_connect() {
        let recorder = recorder(&MetricsSettings::default()).unwrap();
        metrics::with_local_recorder(&recorder, || {
            metrics::histogram!("selvedge_connect_duration_seconds").record(0.0003);
        });
        let text = recorder.handle().render();
        assert!(text.contains("selvedge_connect_duration_seconds_bucket{le=\"0.0005\"} 1"), "{text}");
        assert!(text.contains("selvedge_connect_duration_seconds_bucket{le=\"0.00025\"} 0"), "{text}");
    }
}
