use super::*;

fn cut(text: &str) -> Vec<(&str, usize)> {
    split(text).into_iter().map(|d| (d.text.trim(), d.offset)).collect()
}

#[test]
fn a_file_is_cut_at_its_markers() {
    assert_eq!(cut("a: 1\n---\nb: 2\n"), [("a: 1", 0), ("---\nb: 2", 1)]);
    assert_eq!(cut("--- # first\na: 1\n--- {b: 2}\n"), [("--- # first\na: 1", 0), ("--- {b: 2}", 2)]);
    assert_eq!(cut("\u{feff}---\r\na: 1\r\n---\r\nb: 2"), [("---\r\na: 1", 0), ("---\r\nb: 2", 2)]);
    assert_eq!(cut("a: 1\n...\n# why\n---\nb: 2\n"), [("a: 1", 0), ("# why\n---\nb: 2", 2)]);
    assert_eq!(cut("# head\n\n%YAML 1.2\n---\na: 1\n"), [("# head\n\n%YAML 1.2\n---\na: 1", 0)]);
    assert_eq!(cut("a: |\n  ---\n  text\n----\n"), [("a: |\n  ---\n  text\n----", 0)]);
    assert!(cut("\n\n").is_empty());
}

#[test]
fn a_document_with_markers_and_comments_alone_says_nothing() {
    for text in ["---\n", "# note\n---\n# more\n", "---\n---\n"] {
        assert!(split(text).iter().all(|d| d.parse() == Ok(Value::Null)), "{text:?}");
    }
}

#[test]
fn fields_are_found_on_their_lines() {
    let text = "a: 1\n---\n# note\nmetadata:\n  name: x\n  labels:\n    app.kubernetes.io/name: 3\nspec:\n  ports:\n  - \
                port: 1\n    name: a\n  - {port: 70000,\n     name: b}\n  empty:\n";
    let document = &split(text)[1];
    for (field, line) in [
        ("metadata", 4),
        ("metadata.name", 5),
        ("metadata.labels[app.kubernetes.io/name]", 7),
        ("spec.ports", 9),
        ("spec.ports[0]", 10),
        ("spec.ports[0].name", 11),
        ("spec.ports[1].port", 12),
        ("spec.ports[1].name", 13),
        ("spec.ports[1].protocol", 12),
        ("spec.ports[7].port", 9),
        ("spec.empty", 14),
        ("status.podIPs[0]", 4),
    ] {
        assert_eq!(document.line_of(field), line, "{field}");
    }
}

#[test]
fn what_is_not_yaml_is_told_by_its_line_in_the_file() {
    let unparsed = split("a: 1\n---\nb: [1\nc: 2\n")[1].parse().unwrap_err();
    assert!((3..=4).contains(&unparsed.line), "{unparsed:?}");
    let twice = split("---\na: 1\na: 2\n")[0].parse().unwrap_err();
    assert!(twice.cause.contains("duplicate"), "{twice:?}");
}

#[test]
fn aliases_that_say_too_much_are_refused_and_others_are_followed() {
    let value = split("a: &a {b: 1}\nc: *a\nd: {<<: *a, e: 2}\n")[0].parse().unwrap();
    assert_eq!(value["d"], serde_json::json!({"b": 1, "e": 2}));
    let long = format!("a: &a {}\nb: [{}]\n", "x".repeat(1 << 16), "*a,".repeat(1 << 13));
    let wide = (b'b'..=b'i').fold("a: &a [x,x,x,x,x,x,x,x,x,x]\n".to_owned(), |text, name| {
        let above = (name - 1) as char;
        format!("{text}{0}: &{0} [{1}]\n", name as char, format!("*{above},").repeat(10))
    });
    for bomb in [long, wide] {
        let unparsed = split(&bomb)[0].parse().unwrap_err();
        assert!(
            unparsed.cause.contains("aliases say too much") || unparsed.cause.contains("repetition"),
            "{unparsed:?}"
        );
    }
}

#[test]
fn json_with_its_own_escapes_is_read() {
    let value = split("{\n\t\"a\": \"\\ud83d\\ude00\\/\"\n}\n")[0].parse().unwrap();
    assert_eq!(value["a"], "😀/");
}

#[test]
fn a_broken_document_still_tells_what_it_seems_to_be() {
    let text = "kind: AuthorizationPolicy # deny\nmetadata:\n  labels:\n    name: no\n  name: \"strict\"\n  \
                namespace: shop\nspec:\n  rules: [\n";
    assert_eq!(split(text)[0].guess(), (Some("AuthorizationPolicy"), Some("shop"), Some("strict")));
    assert_eq!(split("kind: Po")[0].guess(), (Some("Po"), None, None));
}

proptest::proptest! {
    #[test]
    fn no_text_is_too_strange(text in "[-.%#a: \\[\\]{}\"'|&*!<\\t\\r\\n\u{feff}]{0,80}") {
        for document in split(&text) {
            let _ = document.parse();
            let _ = document.line_of("a.b[0]");
            let _ = document.guess();
        }
    }
}
