use super::*;

#[test]
fn findings_stand_under_their_area_with_their_cure_and_a_count() {
    let mut findings = Findings::default();
    findings.ok(Area::Cluster, "Kubernetes v1.36.4");
    findings.error(Area::Pods, "pod shop/a is not captured: no rights", "give it some");
    findings.unknown(Area::Pods, "the rest");
    let expected = "\
Cluster
  ✓ Kubernetes v1.36.4
Pods
  ✗ pod shop/a is not captured: no rights
      give it some
  ? the rest

1 error, 0 warnings, 1 could not be found out.
";
    assert_eq!(findings.to_string(), expected);
}
