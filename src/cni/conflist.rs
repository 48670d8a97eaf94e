//! The node's list of plugins, with our entry or without. Pure: text in, text out.

use serde_json::{Value, json};

use super::PLUGIN;
use super::spec::ANNOTATIONS;

/// A list of plugins that our entry cannot stand in.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum NotAList {
    #[error("it is not JSON: {0}")]
    NotJson(String),
    #[error("it is one plugin and no list of plugins; make it a .conflist, with the plugin in `plugins`")]
    Single,
    #[error("its list of plugins is empty")]
    Empty,
}

/// The list with our entry as its last, or nothing where it is so already. Entries of ours that are not as wanted go.
pub(super) fn with_entry(text: &str, shared: &str) -> Result<Option<String>, NotAList> {
    let mut list = parse(text)?;
    let entry = json!({"type": PLUGIN, "sharedDir": shared, "capabilities": {ANNOTATIONS: true}});
    let plugins = plugins(&mut list).ok_or(NotAList::Single)?;
    if plugins.iter().all(is_ours) {
        return Err(NotAList::Empty);
    }
    if plugins.last() == Some(&entry) && plugins.iter().filter(|plugin| is_ours(plugin)).count() == 1 {
        return Ok(None);
    }
    plugins.retain(|plugin| !is_ours(plugin));
    plugins.push(entry);
    Ok(Some(format!("{list:#}\n")))
}

/// The list without our entry, or nothing where it has none.
pub(super) fn without_entry(text: &str) -> Option<String> {
    let mut list = parse(text).ok()?;
    let plugins = plugins(&mut list)?;
    let before = plugins.len();
    plugins.retain(|plugin| !is_ours(plugin));
    (plugins.len() < before).then(|| format!("{list:#}\n"))
}

fn parse(text: &str) -> Result<Value, NotAList> {
    serde_json::from_str(text).map_err(|error| NotAList::NotJson(error.to_string()))
}

fn plugins(list: &mut Value) -> Option<&mut Vec<Value>> {
    list.get_mut("plugins")?.as_array_mut()
}

fn is_ours(plugin: &Value) -> bool {
    plugin["type"] == PLUGIN
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = r#"{"cniVersion": "1.0.0", "name": "c", "plugins": [{"type": "ptp", "mtu": 9000}]}"#;

    #[test]
    fn our_entry_stands_last_and_goes_without_a_trace() {
        let with = with_entry(LIST, "/shared").unwrap().unwrap();
        let list: Value = serde_json::from_str(&with).unwrap();
        assert_eq!(list["plugins"][1]["type"], "selvedge");
        assert_eq!(list["plugins"][1]["capabilities"][ANNOTATIONS], true);
        assert_eq!(with_entry(&with, "/shared"), Ok(None), "nothing to do a second time");
        let without: Value = serde_json::from_str(&without_entry(&with).unwrap()).unwrap();
        assert_eq!(without, serde_json::from_str::<Value>(LIST).unwrap());
        assert_eq!(without_entry(LIST), None);
    }

    #[test]
    fn an_entry_that_is_out_of_place_is_put_right() {
        let other = with_entry(LIST, "/other").unwrap().unwrap();
        let mended = with_entry(&other, "/shared").unwrap().unwrap();
        assert_eq!(mended.matches("\"selvedge\"").count(), 1);
        let first = r#"{"plugins": [{"type": "selvedge"}, {"type": "ptp"}]}"#;
        let list: Value = serde_json::from_str(&with_entry(first, "/shared").unwrap().unwrap()).unwrap();
        assert_eq!((&list["plugins"][0]["type"], list["plugins"].as_array().unwrap().len()), (&json!("ptp"), 2));
    }

    #[test]
    fn what_is_no_list_is_left_alone() {
        assert_eq!(with_entry(r#"{"type": "ptp"}"#, "/s"), Err(NotAList::Single));
        assert_eq!(with_entry(r#"{"plugins": []}"#, "/s"), Err(NotAList::Empty));
        assert!(matches!(with_entry("{", "/s"), Err(NotAList::NotJson(_))));
        assert_eq!(without_entry("{"), None);
    }
}
