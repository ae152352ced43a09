//! The machine's own pools: the survey everywhere, reservation as root.

use genie_hugepages::{PageSize, ReserveError, Root, reserve, survey};

/// How many 2 MB pages the kernel has now, read without this crate.
fn total() -> Option<u64> {
    std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
        .ok()?
        .trim()
        .parse()
        .ok()
}

#[test]
fn the_survey_agrees_with_the_kernel() {
    if total().is_none() {
        println!("skipped: this kernel has no 2 MB pages");
        return;
    }
    // Others change the pool too: look until it held still around a survey.
    let (survey, total) = (0..1000)
        .find_map(|_| {
            let before = total();
            let survey = survey(&Root::system()).expect("/sys is readable");
            (total() == before).then_some((survey, before))
        })
        .expect("the pool holds still once in a while");
    let pool = survey.pool(PageSize::MB_2).expect("sysfs has the pool");
    assert_eq!(Some(pool.total), total);
    assert!(pool.free <= pool.total, "{pool:?}");
    if !pool.nodes.is_empty() {
        let on_nodes: u64 = pool.nodes.iter().map(|node| node.total).sum();
        assert_eq!(on_nodes, pool.total, "{pool:?}");
    }
    assert!(survey.memlock.is_some(), "/proc/self/limits has the line");
}

#[test]
fn pages_are_really_reserved_and_really_given_back() {
    const PAGES: u64 = 4;
    if total().is_none() {
        println!("skipped: this kernel has no 2 MB pages");
        return;
    }
    let reservation = match reserve(&Root::system(), PageSize::MB_2, PAGES, None) {
        Ok(reservation) => reservation,
        Err(
            error @ (ReserveError::NotPermitted { .. }
            | ReserveError::ReadOnly { .. }
            | ReserveError::Short { .. }),
        ) => {
            println!("skipped: {error}");
            return;
        }
        Err(error) => panic!("{error}"),
    };
    assert_eq!(reservation.pages(), PAGES);
    assert!(total().is_some_and(|total| total >= PAGES));
    let released = reservation.release().expect("root may give back");
    assert_eq!(released.freed + released.in_use, PAGES);
    assert_eq!(released.missing, 0);
}
