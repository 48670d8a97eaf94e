use crate::mesh::Workload;

/// The `baggage` header of a CONNECT and of its answer: who a side says it is, for the other side's telemetry. It is
/// a claim; identity comes from certificates alone.
///
/// Form: [W3C Baggage](https://www.w3.org/TR/baggage/); keys as the field's node proxies send them.
pub fn baggage(cluster: &str, workload: &Workload) -> String {
    let pod = &workload.pod;
    let owner_key = match &*pod.owner.kind {
        "Deployment" => "k8s.deployment.name",
        "Job" => "k8s.job.name",
        "CronJob" => "k8s.cronjob.name",
        "StatefulSet" => "k8s.statefulset.name",
        "DaemonSet" => "k8s.daemonset.name",
        _ => "k8s.pod.name",
    };
    let label = |keys: &[&str]| keys.iter().find_map(|key| pod.labels.get(key));
    let service = label(&["app.kubernetes.io/name", "app"]).unwrap_or(&pod.owner.name);
    let version = label(&["app.kubernetes.io/version", "version"]).unwrap_or("latest");
    let mut header = String::with_capacity(160);
    for (key, value) in [
        ("k8s.cluster.name", cluster),
        ("k8s.namespace.name", &*pod.name.namespace),
        (owner_key, &*pod.owner.name),
        ("service.name", service),
        ("service.version", version),
        ("cloud.availability_zone", workload.zone.as_deref().unwrap_or_default()),
    ] {
        if value.is_empty() {
            continue;
        }
        if !header.is_empty() {
            header.push(',');
        }
        header.push_str(key);
        header.push('=');
        push_encoded(&mut header, value);
    }
    header
}

// W3C Baggage, section 3.3.1.3: a value is of `baggage-octet`; everything else is percent-encoded.
fn push_encoded(header: &mut String, value: &str) {
    for byte in value.bytes() {
        match byte {
            0x21 | 0x23..=0x24 | 0x26..=0x2b | 0x2d..=0x3a | 0x3c..=0x5b | 0x5d..=0x7e => header.push(byte as char),
            _ => header.push_str(&format!("%{byte:02X}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_percent_encoded() {
        let mut header = String::new();
        push_encoded(&mut header, "a b,c;d%e\"é");
        assert_eq!(header, "a%20b%2Cc%3Bd%25e%22%C3%A9");
    }
}
